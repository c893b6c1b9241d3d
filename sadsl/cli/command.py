"""``Command``: a word of the command line, with its flags, its help and its result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from absl import flags

USAGE_OF_SPEC = """\
SPEC is text such as "causal() & (window(512) | sinks(4))", or @FILE for a file that
holds such text or that sadsl.save wrote."""


@dataclass(frozen=True)
class CommandResult:
    """What a command found: text for people, and values for ``--json``."""

    text: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class CommandFlag:
    """One flag; ``shown`` stands for its value in the help if it has no default."""

    name: str
    help: str
    kind: Literal["integer", "text", "texts", "choice", "switch"] = "integer"
    default: Any = None
    shown: str = "N"
    choices: tuple[str, ...] = ()
    least: int = 1

    def define(self, values: flags.FlagValues) -> None:
        """Defines the flag among ``values``."""
        about = {"name": self.name, "help": self.help, "flag_values": values}
        match self.kind:
            case "integer":
                flags.DEFINE_integer(
                    default=self.default, lower_bound=self.least, **about
                )
            case "text":
                flags.DEFINE_string(default=self.default, **about)
            case "texts":
                flags.DEFINE_multi_string(default=self.default, **about)
            case "choice":
                flags.DEFINE_enum(
                    default=self.default, enum_values=self.choices, **about
                )
            case "switch":
                flags.DEFINE_boolean(default=False, **about)

    @property
    def usage(self) -> str:
        """The flag and its value, as the help shows them."""
        if self.kind == "switch":
            return f"--{self.name}"
        return f"--{self.name} {self.shown if self.default is None else self.default}"


JSON = CommandFlag("json", "print values for machines instead of text", "switch")


@dataclass(frozen=True)
class Command:
    """A command; ``run`` takes the flags, and then the spec if the command has one."""

    name: str
    summary: str
    run: Callable[..., CommandResult]
    example: str
    options: tuple[CommandFlag, ...] = ()
    takes_spec: bool = True

    def parse(self, args: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
        """The flags in ``args``, and the words that are no flags.

        Raises:
          flags.Error: a flag is unknown, or its value is refused.
        """
        values = flags.FlagValues()
        for flag in (*self.options, JSON):
            flag.define(values)
        # Flags may stand behind the spec too.
        values.set_gnu_getopt(True)
        _, *words = values([self.name, *args])
        return values, words

    @property
    def help(self) -> str:
        """The text of ``sadsl COMMAND --help``."""
        spec = " SPEC" if self.takes_spec else ""
        shown = (*self.options, JSON)
        width = max(len(flag.usage) for flag in shown)
        lines = [
            f"Usage: sadsl {self.name}{spec} [flags]",
            "",
            self.summary,
            *(["", USAGE_OF_SPEC] if self.takes_spec else []),
            "",
            "Flags, with their defaults:",
            *(f"  {flag.usage:<{width}}  {flag.help}" for flag in shown),
            "",
            "Example:",
            f"  sadsl {self.name} {self.example}".rstrip(),
        ]
        return "\n".join(lines)
