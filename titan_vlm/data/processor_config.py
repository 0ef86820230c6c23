"""What an exported checkpoint says about pictures, in the published checkpoints' own form.

Written beside the weights so that AutoProcessor (transformers) and vLLM prepare pictures exactly
as training did.
"""

from titan_vlm.data.images import MEAN, STD, VisualSpec
from titan_vlm.data.videos import MAX_FRAMES, MIN_FRAMES


def image_processor_config(spec: VisualSpec) -> dict:
    """preprocessor_config.json"""
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels},
        **_common(spec),
    }


def video_processor_config(spec: VisualSpec) -> dict:
    """video_preprocessor_config.json"""
    return {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": {"shortest_edge": spec.video_min_pixels, "longest_edge": spec.video_max_pixels},
        "do_sample_frames": True,
        "fps": spec.video_fps,
        "min_frames": MIN_FRAMES,
        "max_frames": MAX_FRAMES,
        "cap_pixels_per_frame": False,
        **_common(spec),
    }


def processor_configs(spec: VisualSpec) -> dict[str, dict]:
    """Both files of an exported checkpoint, by name."""
    return {
        "preprocessor_config.json": image_processor_config(spec),
        "video_preprocessor_config.json": video_processor_config(spec),
    }


def _common(spec: VisualSpec) -> dict:
    return {
        "processor_class": "Qwen3VLProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
        "patch_size": spec.patch_size,
        "temporal_patch_size": spec.temporal_patch_size,
        "merge_size": spec.merge_size,
    }
