"""Values chosen with the help of data: layer by layer, so that one layer at a time is in memory.

A layer is run on the calibration samples, what its linear layers see is summed up, its quantized
tensors are chosen and written, and the samples go on through the quantized layer. The stream that
writes the checkpoint then takes those tensors instead of computing them.
"""

from tightfit.quantize.calibration.calibrate import calibrate as calibrate
from tightfit.quantize.calibration.calibrate import is_needed as is_needed
from tightfit.quantize.calibration.calibrate import promised_scales as promised_scales
from tightfit.quantize.calibration.options import CalibrationOptions as CalibrationOptions
