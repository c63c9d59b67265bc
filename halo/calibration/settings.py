"""The section `calibrate` of the configuration."""

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from halo.settings import HOW, Settings

SHORTEST = 32  # tokens of a sequence that says anything about distances


class CalibrateSettings(Settings):
    """Closed forms for some weights of the recurrent layers, before any of them is trained."""

    parts: str = Field(
        "auto",
        description="what to set: parts joined by + (rank, decay, beta, gate, gain, ridge); auto: the "
        "best found for the mixer; faithful: gdn, as the published code; off: nothing",
    )
    samples: PositiveInt = Field(16, description="sequences of training text to fit on")
    held_samples: PositiveInt = Field(4, description="further sequences, to measure the layers' errors on")
    length: PositiveInt = Field(4096, ge=SHORTEST, description="tokens per sequence, or fewer if the text is short")
    sinks: NonNegativeInt = Field(4, description="first tokens that do not count for how far a head looks back")
    gain: Literal["channel", "head"] = Field("channel", description="what the part gain has a factor for")
    ridge: float = Field(0.1, gt=0, description="penalty of the part ridge, relative to the mean power of its inputs")
    block: PositiveInt = Field(
        256, json_schema_extra=HOW, description="queries whose attention is in memory at a time, of one sequence"
    )

    @field_validator("parts", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML takes the word `off` for false
