"""synthetic_images, where earlier versions of the guide imported it from."""

from fairseq.quantization.calibration.synthetic import synthetic_images

__all__ = ["synthetic_images"]
