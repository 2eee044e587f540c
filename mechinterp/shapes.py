"""Names for the shapes that cross module borders (jaxtyping; checked at run time in the tests)."""

from jaxtyping import Float, Int
from torch import Tensor

TokenIds = Int[Tensor, "example pos"]
Resid = Float[Tensor, "*batch d_model"]
Logits = Float[Tensor, "*batch vocab"]
Scores = Float[Tensor, " example"]
PatternBlock = Float[Tensor, "example head query key"]
