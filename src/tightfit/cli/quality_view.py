"""What `quantize` prints of errors: kinds of modules, the worst matrices, rankings, recipes."""

from rich.console import Console

from tightfit.quantize.budget import FittedRecipe
from tightfit.quantize.quality import Quality
from tightfit.quantize.sensitivity import Sensitivity


def render_quality(quality: Quality, console: Console) -> None:
    """A row for each kind of module, and the ten worst matrices."""
    raise NotImplementedError


def render_sensitivity(sensitivity: Sensitivity, console: Console) -> None:
    """Layers and kinds of modules, most damaged first."""
    raise NotImplementedError


def render_budget(recipe: FittedRecipe, console: Console) -> None:
    """What each kind of module got, and what it comes to."""
    raise NotImplementedError
