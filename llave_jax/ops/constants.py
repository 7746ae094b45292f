"""What the attention kernels of all platforms have in common, and the name by which layers keep their results."""

import math

# The score of a key that its query must not see. It stands for minus infinity, but stays finite when a
# score is added to it or when it is subtracted from itself.
MASKED = -1e30
# Kernels compute exp(x) as exp2(x * LOG2_E): exp2 is what the hardware has.
LOG2_E = math.log2(math.e)
# The results of a forward kernel that its backward kernels read carry this name. A rematerialisation
# policy that saves the name runs the forward kernel once; one that does not runs it twice.
RESIDUALS = "attention_residuals"
