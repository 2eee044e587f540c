"""Every error that mechinterp raises on purpose.

    MechinterpError
    ├── ModelError          a model, checkpoint, tokenizer or weight that cannot be used
    ├── SiteError           a site that does not exist, or not in this model
    ├── ExamplesError       prompts, answers or spans that cannot be run
    │   └── AlignmentError  clean and corrupted prompts that do not line up
    ├── NeedsError          an analyzer and the engine disagree about what was declared
    ├── HookError           a read that did not fire, a write without effect
    ├── OutputError         a result, figure or report that cannot be written or read
    └── ConfigurationError  a configuration file that cannot be used

A message states the fact, then the site and its shape where there is one, then the fix.
"""


class MechinterpError(Exception):
    """Base of all errors raised on purpose by this package."""


class ModelError(MechinterpError):
    """A model, checkpoint, tokenizer or weight that cannot be used."""


class SiteError(MechinterpError, LookupError):
    """A site that does not exist, or that this model lacks."""


class ExamplesError(MechinterpError, ValueError):
    """Prompts, answers, spans or labels that cannot be run as they are."""


class AlignmentError(ExamplesError):
    """Clean and corrupted prompts that do not line up token by token."""


class NeedsError(MechinterpError):
    """An analyzer used what it did not declare, or declared what cannot be answered."""


class HookError(MechinterpError, RuntimeError):
    """A read that did not fire, or a write that had no effect."""


class OutputError(MechinterpError, OSError):
    """A result, figure or report that cannot be written or read back."""


class ConfigurationError(MechinterpError, ValueError):
    """A configuration file that cannot be used; the message has its line and key."""
