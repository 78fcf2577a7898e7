"""Building blocks that compute on tensors and single layers."""
