"""Pictures exactly as transformers prepares them: pixels, grids, text and positions."""

import io
import json
import tarfile
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from titan_vlm.data.chat import Encoder
from titan_vlm.data.images import VisualSpec, image_grid, prepare_image
from titan_vlm.data.processor_config import processor_configs
from titan_vlm.data.sample import ImageRef, VideoRef, image_part, open_bytes, text_part, video_part
from titan_vlm.data.tokenizer import load_tokenizer
from titan_vlm.data.videos import pair_times, plan_video, prepare_video, sample_frames
from titan_vlm.errors import DataError

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "cc12m-train-0000.tar"
PUBLISHED = VisualSpec(65536, 16777216, 4096, 25165824)
SMALL = VisualSpec(1024, 100_000, 4096, 1_000_000)
TINY_PATCHES = VisualSpec(256, 40_000, 4096, 300_000, patch_size=6, temporal_patch_size=3)
ODD_SIZES = [(1, 1), (32, 32), (33, 31), (40, 17), (200, 3), (255, 257), (48, 48), (640, 360)]


def noise(width, height, mode="RGB", seed=0):
    rng = np.random.default_rng([seed, width, height])
    bands = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,), "LA": (2,)}[mode]
    values = rng.integers(0, 256, (height, width, *bands), dtype=np.uint8)
    return Image.fromarray(values, mode) if mode in ("CMYK", "LA") else Image.fromarray(values)


def image_processor(spec):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels},
        patch_size=spec.patch_size,
        merge_size=spec.merge_size,
        temporal_patch_size=spec.temporal_patch_size,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def ours(image, spec):
    ref = ImageRef("test", lambda: image)
    grid = image_grid(*ref.header_size(), spec)
    return torch.from_numpy(prepare_image(ref.load_rgb(), grid, spec)), grid


def assert_equal_to_transformers(image, spec):
    expected = image_processor(spec)(images=[image], return_tensors="pt")
    pixels, grid = ours(image, spec)
    assert list(grid) == expected["image_grid_thw"][0].tolist()
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, expected["pixel_values"])


@pytest.mark.parametrize("spec", [PUBLISHED, SMALL, TINY_PATCHES], ids=["published", "small", "p6"])
@pytest.mark.parametrize("size", ODD_SIZES, ids=str)
def test_images_of_odd_sizes_are_bit_identical(size, spec):
    assert_equal_to_transformers(noise(*size), spec)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "LA"])
def test_other_colour_modes_are_bit_identical(mode):
    assert_equal_to_transformers(noise(70, 50, mode), SMALL)


def test_palette_transparent_and_black_and_white_images_are_bit_identical():
    assert_equal_to_transformers(noise(70, 50).quantize(17), SMALL)
    buffer = io.BytesIO()
    noise(70, 50).quantize(17).save(buffer, "PNG", transparency=3)
    assert_equal_to_transformers(Image.open(buffer), SMALL)
    bits = noise(70, 50, "L").convert("1")
    assert_equal_to_transformers(bits, SMALL)


@pytest.mark.skipif(not PHOTOS.exists(), reason="needs the shared photographs")
@pytest.mark.parametrize("spec", [PUBLISHED, SMALL], ids=["published", "small"])
def test_photographs_are_bit_identical(spec):
    with tarfile.open(PHOTOS) as tar:
        photos = [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")]
    assert len(photos) == 32
    for data in photos[::4]:
        assert_equal_to_transformers(Image.open(io.BytesIO(data)), spec)


def test_extreme_shapes_are_refused_as_transformers_refuses_them():
    with pytest.raises(DataError, match="aspect ratio 201, at most 200"):
        image_grid(201, 1, SMALL)
    with pytest.raises(ValueError):
        image_processor(SMALL)(images=[noise(201, 1)], return_tensors="pt")


# Videos: transformers' processor exists only where torchvision does.


@pytest.fixture(scope="module")
def video_processor_class():
    pytest.importorskip("torchvision")
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    return Qwen3VLVideoProcessor


def make_video_processor(cls, spec):
    return cls(
        size={"shortest_edge": spec.video_min_pixels, "longest_edge": spec.video_max_pixels},
        patch_size=spec.patch_size,
        merge_size=spec.merge_size,
        temporal_patch_size=spec.temporal_patch_size,
        fps=spec.video_fps,
        cap_pixels_per_frame=False,
    )


def clip(frames, width, height, fps):
    images = [noise(width, height, seed=k) for k in range(frames)]
    refs = [ImageRef(f"frame{k}", image.copy) for k, image in enumerate(images)]
    return VideoRef("clip", refs, fps), np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("spec", [PUBLISHED, SMALL, TINY_PATCHES], ids=["published", "small", "p6"])
@pytest.mark.parametrize(
    ("frames", "width", "height", "fps"),
    [
        (4, 64, 64, 2.0),
        (9, 70, 50, 24.0),
        (13, 33, 90, 3.0),
        (30, 20, 40, 10.0),
        (6, 300, 200, 1.5),
    ],
)
def test_videos_are_bit_identical(video_processor_class, spec, frames, width, height, fps):
    video, array = clip(frames, width, height, fps)
    processor = make_video_processor(video_processor_class, spec)
    expected = processor(
        [array.transpose(0, 3, 1, 2)],
        video_metadata=[{"total_num_frames": frames, "fps": fps}],
        return_metadata=True,
        return_tensors="pt",
    )
    plan = plan_video(video, spec)
    assert list(plan.grid) == expected["video_grid_thw"][0].tolist()
    assert plan.frame_indices == list(expected["video_metadata"][0].frames_indices)
    pixels = torch.from_numpy(prepare_video(video, plan, spec))
    assert torch.equal(pixels, expected["pixel_values_videos"])


@pytest.mark.parametrize("spec", [PUBLISHED, SMALL, TINY_PATCHES], ids=["published", "small", "p6"])
@pytest.mark.parametrize("frames", [3, 4, 5, 12])
@pytest.mark.parametrize("size", [(20, 7), (64, 64), (90, 33), (500, 333)], ids=str)
def test_video_steps_equal_transformers_own_functions(spec, frames, size):
    """Without torchvision: every step that transformers can run alone, torch's resize between."""
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    # By its name: transformers' package itself denies having it where torchvision is missing.
    hf = import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")
    width, height = size
    video, array = clip(frames, width, height, 3.0)
    plan = plan_video(video, spec)

    class Settings:
        fps, min_frames, max_frames = spec.video_fps, 4, 768

    class Metadata:
        total_num_frames, fps = frames, 3.0

    indices = hf.Qwen3VLVideoProcessor.sample_frames(Settings, Metadata)
    assert plan.frame_indices == indices.tolist()
    times = Qwen3VLProcessor._calculate_timestamps(None, indices, 3.0, spec.temporal_patch_size)
    assert plan.timestamps == times
    new_h, new_w = hf.smart_resize(
        len(indices),
        height,
        width,
        spec.temporal_patch_size,
        spec.factor,
        spec.video_min_pixels,
        spec.video_max_pixels,
    )
    chosen = torch.from_numpy(array[indices].transpose(0, 3, 1, 2).copy())
    if (new_h, new_w) != (height, width):
        chosen = torch.nn.functional.interpolate(
            chosen, (new_h, new_w), mode="bicubic", align_corners=False, antialias=True
        )
    half = torch.tensor(0.5) * (1.0 / (1 / 255))
    values = (chosen.float() - half) / half
    expected, *grid = hf.Qwen3VLVideoProcessor.patchify(
        None, values[None], spec.patch_size, spec.merge_size, spec.temporal_patch_size
    )
    assert list(plan.grid) == grid
    assert torch.equal(torch.from_numpy(prepare_video(video, plan, spec)), expected[0])


def test_frames_are_sampled_evenly_and_timed_in_pairs():
    spec = VisualSpec(1024, 4096, 4096, 10**6, video_fps=2.0)
    assert sample_frames(48, 24.0, spec) == [0, 16, 31, 47]  # two seconds: four frames
    assert sample_frames(3, 24.0, spec) == [0, 1, 2]  # never more than there are
    assert len(sample_frames(24_000, 24.0, spec)) == 768  # nor than the processor takes
    assert pair_times([0, 16, 31, 47], 24.0, 2) == [8 / 24, 39 * 2 / 48]
    assert pair_times([0, 1, 2], 1.0, 2) == [0.5, 2.0]  # the last frame stands alone


def test_videos_of_one_frame_or_of_uneven_frames_are_refused():
    video, _ = clip(1, 64, 64, 2.0)
    with pytest.raises(DataError, match="1 frame"):
        plan_video(video, SMALL)
    video, _ = clip(4, 64, 64, 2.0)
    video.frames[2] = ImageRef("other", noise(32, 64).copy)
    with pytest.raises(DataError, match="different sizes"):
        prepare_video(video, plan_video(video, SMALL), SMALL)


def test_video_files_are_decoded_at_the_planned_frames(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for k in range(20):
            picture = Image.new("RGB", (96, 64), (k * 12, 0, 255 - k * 12))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    video = VideoRef("v.mp4", path=str(path))
    plan = plan_video(video, SMALL)
    assert plan.frame_indices == [0, 6, 13, 19] and len(plan.timestamps) == 2
    pixels_NC = prepare_video(video, plan, SMALL)
    patches = pixels_NC.reshape(2, -1, 3, 2, 16 * 16)
    red = (patches[:, :, 0].mean(axis=(1, 3)).flatten() + 1) / 2 * 255
    assert np.abs(red - np.array([0, 6, 13, 19]) * 12).max() < 10
    path.write_bytes(b"no video")
    with pytest.raises(DataError, match="v.mp4: cannot be read as a video"):
        plan_video(video, SMALL)


def test_video_files_without_av_say_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(DataError, match="pip install av"):
        plan_video(VideoRef("v.mp4", path="v.mp4"), SMALL)


# Positions and text.


def rope_index(sample, ids):
    """transformers' own positions for the same tokens."""
    from transformers.models.qwen3_vl import modeling_qwen3_vl as hf
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig

    class Positions:
        config = Qwen3VLConfig()
        get_vision_position_ids = hf.Qwen3VLModel.get_vision_position_ids
        get_rope_index = hf.Qwen3VLModel.get_rope_index

    tokens = torch.from_numpy(sample.tokens_L)[None]
    kinds = (tokens == ids.image).int() + 2 * (tokens == ids.video).int()
    images = [v.grid for v in sample.visuals if v.plan is None]
    videos = [v.grid for v in sample.visuals if v.plan is not None]
    positions, _ = Positions().get_rope_index(
        tokens,
        kinds,
        torch.tensor(images) if images else None,
        torch.tensor(videos) if videos else None,
    )
    return positions[:, 0]


def conversations():
    def image(width, height):
        return image_part(ImageRef("i", noise(width, height).copy))

    def video(*shape):
        return video_part(clip(*shape)[0])

    text = text_part
    return {
        "text": [text("Hello, how are you?")],
        "image": [image(64, 64), text("What is this?")],
        "odd sizes": [image(33, 131), text("or"), image(255, 40), image(32, 32), text("?")],
        "video": [video(9, 70, 50, 24.0), text("What happens?")],
        "mixed": [text("See"), video(5, 64, 96, 2.0), image(99, 40), video(4, 50, 50, 1.0)],
    }


@pytest.mark.parametrize("name", conversations())
def test_positions_equal_transformers_get_rope_index(name):
    encoder = Encoder(load_tokenizer(), SMALL)
    sample = encoder.encode_prompt([{"role": "user", "content": conversations()[name]}])
    expected = rope_index(sample, encoder.ids)
    assert torch.equal(torch.from_numpy(sample.positions_3L), expected)


@pytest.mark.parametrize("name", conversations())
def test_tokens_equal_the_text_that_transformers_processor_writes(name):
    """Its own expansion of the placeholders, run without the processor around it."""
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor as hf

    encoder = Encoder(load_tokenizer(), SMALL)
    messages = [{"role": "user", "content": conversations()[name]}]
    sample = encoder.encode_prompt(messages)

    processor = SimpleNamespace(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        all_special_multimodal_tokens=["<|image_pad|>", "<|video_pad|>"],
        image_processor=SimpleNamespace(merge_size=SMALL.merge_size),
        video_processor=SimpleNamespace(merge_size=SMALL.merge_size, temporal_patch_size=2),
        _calculate_timestamps=partial(hf._calculate_timestamps, None),
    )
    images = [v for v in sample.visuals if v.plan is None]
    videos = [v for v in sample.visuals if v.plan is not None]
    grids = {"image_grid_thw": np.array([v.grid for v in images])}
    clips = {
        "video_grid_thw": np.array([v.grid for v in videos]),
        "video_metadata": [
            SimpleNamespace(fps=v.ref.fps, frames_indices=list(v.plan.frame_indices))
            for v in videos
        ],
    }
    plain = [{"type": p["type"], "text": p.get("text")} for p in messages[0]["content"]]
    text = encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": plain}], tokenize=False, add_generation_prompt=True
    )
    (expanded,), _ = hf.get_text_with_replacements(
        processor,
        [text],
        [hf.replace_image_token(processor, grids, k) for k in range(len(images))],
        [hf.replace_video_token(processor, clips, k) for k in range(len(videos))],
    )
    assert sample.tokens_L.tolist() == encoder.tokenizer(expanded).input_ids


@pytest.mark.parametrize("name", conversations())
def test_exported_processor_gives_the_same_tokens_and_pixels(video_processor_class, tmp_path, name):
    """AutoProcessor, from an exported directory, against our encoder."""
    from transformers import AutoProcessor
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    tokenizer = load_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for file, config in processor_configs(SMALL).items():
        (tmp_path / file).write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, Qwen3VLProcessor)
    pil = image_processor(SMALL)  # the default backend rounds its resizing differently
    assert processor.image_processor.size == pil.size
    processor.image_processor = pil

    content = conversations()[name]
    images = [p["image"].open() for p in content if p["type"] == "image"]
    videos = [p["video"] for p in content if p["type"] == "video"]
    arrays = [
        np.stack([np.asarray(f.load_rgb()).transpose(2, 0, 1) for f in video.frames])
        for video in videos
    ]
    messages = [{"role": "user", "content": content}]
    encoder = Encoder(tokenizer, SMALL)
    plain = [{"type": p["type"], "text": p.get("text")} for p in content]
    text = processor.apply_chat_template(
        [{"role": "user", "content": plain}], tokenize=False, add_generation_prompt=True
    )
    metadata = [{"total_num_frames": len(v.frames), "fps": v.fps} for v in videos]
    given = {"images": images} if images else {}
    if videos:
        given |= {"videos": arrays, "video_metadata": metadata}
    expected = processor(text=[text], **given, return_tensors="pt")
    sample = encoder.encode_prompt(messages)
    assert sample.tokens_L.tolist() == expected["input_ids"][0].tolist()
    for kind, key in ((False, "pixel_values"), (True, "pixel_values_videos")):
        mine = [v.pixels(SMALL) for v in sample.visuals if (v.plan is not None) == kind]
        if mine:
            assert torch.equal(torch.from_numpy(np.concatenate(mine)), expected[key])


def test_exported_files_are_accepted_by_transformers_without_torchvision(tmp_path):
    from transformers import AutoImageProcessor

    for file, config in processor_configs(SMALL).items():
        (tmp_path / file).write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    image = noise(123, 77)
    expected = processor(images=[image], return_tensors="pt")
    assert torch.equal(ours(image, SMALL)[0], expected["pixel_values"])


def test_pictures_from_bytes_are_the_same_pictures():
    buffer = io.BytesIO()
    noise(50, 40).save(buffer, "PNG")
    ref = ImageRef("png", partial(open_bytes, buffer.getvalue()))
    pixels = prepare_image(ref.load_rgb(), image_grid(*ref.header_size(), SMALL), SMALL)
    assert torch.equal(torch.from_numpy(pixels), ours(noise(50, 40), SMALL)[0])
