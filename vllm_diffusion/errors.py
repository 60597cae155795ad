"""Every error this package raises on purpose.

    VllmDiffusionError
    ├── UnsupportedVllmError        the installed vLLM is missing or outside the tested range
    ├── UnsupportedRunnerError      a diffusion model was sent to a runner that cannot serve it
    ├── TraceError                  a file is not a recorded trace, or not one that can be read
    ├── TuneError                   a task to tune for, or a rule to try, is invalid
    ├── CheckpointError             a checkpoint lacks, or contradicts, something we must read
    ├── AdapterError                a LoRA adapter does not fit the served model
    ├── ParamsError                 a request asks for something impossible
    │   └── ConstraintError         a constraint is malformed, unsupported, or unsatisfiable
    │       └── AutomatonError      a constraint is valid, but its automaton exceeds the limits
    └── ConfigError                 an engine option is impossible

A message is one sentence or one list of all problems: what was found, what is accepted, and what to
do about it. `CheckpointError` and those listed after it are also `ValueError`, which vLLM turns
into a reply of status 400 (a request, an adapter) or a refusal to start (an option, a checkpoint).
The two about the installation are not: pydantic wraps a `ValueError` raised while vLLM builds its
configuration in text of its own, and these messages must reach the user unchanged.
"""


class VllmDiffusionError(Exception):
    """Base of all errors of this package; catch it to catch them all."""


class UnsupportedVllmError(VllmDiffusionError):
    """The installed vLLM is missing, unreadable, or outside the tested range."""


class UnsupportedRunnerError(VllmDiffusionError):
    """A diffusion model was sent to a model runner that cannot serve it."""


class TraceError(VllmDiffusionError):
    """A file is not a complete trace in the format that this version reads."""


class TuneError(VllmDiffusionError):
    """A task to tune for, its verifier, or a rule to try on it is invalid."""


class CheckpointError(VllmDiffusionError, ValueError):
    """A checkpoint lacks, or contradicts, something that must be read from it."""


class AdapterError(VllmDiffusionError, ValueError):
    """A LoRA adapter cannot be served on this model; the message names every problem at once."""


class ParamsError(VllmDiffusionError, ValueError):
    """A request asks for something impossible; the message names every problem at once."""


class ConstraintError(ParamsError):
    """A constraint is malformed, uses an unsupported feature, or is unsatisfiable."""


class AutomatonError(ConstraintError):
    """A constraint's automaton exceeds the limits; a parser might still enforce the constraint."""


class ConfigError(VllmDiffusionError, ValueError):
    """An engine option is impossible; the message names the option and what it accepts."""
