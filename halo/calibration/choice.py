"""Which parts of a calibration a mixer can have, and which it has by default."""

# In the order in which they are applied.
APPLICABLE = {
    "lightning": ("rank", "decay", "gain", "ridge"),
    "gdn": ("decay", "beta", "gate", "gain", "ridge"),
    "mamba2": ("decay", "gate", "gain", "ridge"),
}
AUTO = {
    "lightning": ("rank", "gain"),
    "gdn": ("decay", "beta", "gate", "gain"),
    "mamba2": ("decay", "gate", "gain"),
}
FAITHFUL = ("gdn",)


def chosen_parts(text: str, mixer: str, gated: bool = True) -> tuple[str, ...]:
    """Return the parts that `calibrate.parts` names, in the order in which they are applied.

    Args:
        text: "auto", "off", "faithful", or parts joined by "+", in any order.
        mixer: The kind of the recurrent layers.
        gated: Whether they have an output gate.

    Returns:
        The parts; none for "off".

    Raises:
        ValueError: If the mixer does not have them.
    """
    if text == "off":
        return ()
    if text == "auto":
        return tuple(part for part in AUTO[mixer] if gated or part != "gate")
    if text == "faithful" and mixer in FAITHFUL:
        return ("faithful",)
    named, known = text.split("+"), tuple(part for part in APPLICABLE[mixer] if gated or part != "gate")
    both = {"rank", "decay"} <= set(named)
    if not set(named) <= set(known) or len(set(named)) < len(named) or both:
        special = ["auto", "off", *(["faithful"] if mixer in FAITHFUL else [])]
        apart = ", rank and decay not together" if "rank" in known else ""
        raise ValueError(
            f"calibrate.parts: must be {', '.join(special)} or some of {', '.join(known)} joined by + for mixer "
            f"{mixer}{apart}, got {text}"
        )
    return tuple(part for part in known if part in named)
