"""What `mhc run` was told, as the environment variable that carries it to the script and to its children."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from mhc_compile.errors import OptionError

__all__ = ["VARIABLE", "Order"]

#: Its name. The value is four lines: `pid`, `prefix`, what to say where torch was never imported, and the `Order` as JSON. The first three are all
#: that `site/sitecustomize.py` reads where it cannot know whether the standard library is the real one.
VARIABLE = "MHC_RUN"


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to run with what.

    Attributes:
        script: the script as messages name it: "train.py", "-m package.module".
        options: options of the backend that differ from the defaults, validated.
        quiet: say nothing of what was done.
        pid: the process that becomes the script; all others are its children.
        prefix: `sys.prefix` of its Python. Pythons of other environments are left alone.
        reports: a file that children append to. It exists once one of them has compiled something.
    """

    script: str
    options: dict[str, Any]
    quiet: bool
    pid: int
    prefix: str
    reports: str

    @property
    def never_compiled(self) -> str:
        """What to say of a script that had no use for a backend."""
        return (
            f"mhc run: nothing was rewritten: {self.script} ran no model that torch.compile made."
            " Write model = torch.compile(model), without a backend, in front of the training loop"
        )

    def dump(self) -> str:
        """The value of the variable.

        Raises:
            OptionError: a setting for Inductor is no number, string, truth value or list of those.
        """
        try:
            lines = [str(self.pid), self.prefix, "" if self.quiet else self.never_compiled, json.dumps(asdict(self))]
        except TypeError as error:
            raise OptionError(
                f"option 'inductor' is {self.options.get('inductor')!r}; mhc run can pass on numbers, strings, truth values and lists: {error}"
            ) from None
        return "\n".join(line.replace("\n", " ") for line in lines)

    @classmethod
    def load(cls, value: str) -> Order:
        """The order in the value of the variable."""
        return cls(**json.loads(value.rpartition("\n")[2]))
