"""What the files of a sharded checkpoint call the parameters, per engine and version.

vLLM's `ShardedStateLoader` demands exactly the names of its own state dict, which follow its module
tree and drift between versions: of tensors that share memory only the alphabetically first name is
stored, and every attention layer wants four float32 scalars, although nothing is quantized.
"""

from tightfit.model.stored.layouts import DEFAULT_LAYOUT as DEFAULT_LAYOUT
from tightfit.model.stored.layouts import LAYOUTS as LAYOUTS
from tightfit.model.stored.layouts import StoredLayout as StoredLayout
from tightfit.model.stored.layouts import stored_layout as stored_layout
from tightfit.model.stored.tensors import rank_tensors as rank_tensors
