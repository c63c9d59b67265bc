"""A conversation with a saved model, which reads only what is new in every turn."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress

from halo.continuation import Writer
from halo.errors import HaloError

RESET, QUIT = "/reset", "/quit"


class Chat:
    """The turns so far, as messages and as the tokens that the model has read and written.

    Args:
        writer: The model.
        system: The system message; None for none.
        raw: Whether lines are plain text that the model continues, without a chat template.

    Raises:
        HaloError: If the tokenizer has no chat template and `raw` is False, or if `raw` comes with a system message.
    """

    def __init__(self, writer: Writer, system: str | None, raw: bool) -> None:
        if not raw and not writer.tokenizer.chat_template:
            raise HaloError("model: must have a tokenizer with a chat template, got none; --raw continues plain text")
        if raw and system is not None:
            raise HaloError("--system: must be left out with --raw, which writes no messages")
        self.writer, self.system, self.raw = writer, system, raw
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.text, self.tokens = "", list[int]()
        self.writer.forget()

    def answer(self, line: str) -> None:
        """Print the model's answer to a line, or its continuation, and keep both."""
        prompt = self._plain(line) if self.raw else self._templated(line)
        new, _ = self.writer.write(prompt)
        decode = self.writer.tokenizer.decode
        self.tokens = prompt + new
        self.text += str(decode(new, skip_special_tokens=False))
        self.messages.append({"role": "assistant", "content": str(decode(new, skip_special_tokens=True))})

    def _plain(self, line: str) -> list[int]:
        """Return the tokens so far and those of the line, on a line of its own."""
        if not self.tokens:
            return self.writer.encode(line, special=True)
        return self.tokens + self.writer.encode("\n" + line, special=False)

    def _templated(self, line: str) -> list[int]:
        """Return the tokens of the conversation with the line as a message of the user.

        The template writes the whole conversation. Where that begins with the text so far, only the rest is turned
        into tokens: to split an answer anew could give other tokens than the model wrote. Templates that leave out
        parts of former answers, such as the thinking, change what is before, and everything is read again.
        """
        self.messages.append({"role": "user", "content": line})
        before, self.text = self.text, self.writer.render(self.messages)
        if before and self.text.startswith(before):
            return self.tokens + self.writer.encode(self.text[len(before) :], special=False)
        return self.writer.encode(self.text, special=False)

    def run(self, lines: Iterable[str]) -> None:
        """Answer lines until they end or one is /quit; /reset begins anew."""
        for line in lines:
            command = line.strip()
            if command == QUIT:
                return
            if command == RESET:
                self.reset()
            elif command:
                self.answer(line)


def typed_lines() -> Iterator[str]:
    """Yield the lines that are typed at a terminal, until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401  lines can be edited and called back
    print(f"{RESET} begins anew, {QUIT} or Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
