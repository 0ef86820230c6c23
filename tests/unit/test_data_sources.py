"""Sources: every form that is promised, and every kind of bad input with its file and line."""

import base64
import io
import json
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from titan_vlm.config import Config, Eval
from titan_vlm.data.chat import Encoder
from titan_vlm.data.config import Data
from titan_vlm.data.images import visual_spec
from titan_vlm.data.sources import build_held_out, build_source
from titan_vlm.data.tokenizer import load_tokenizer
from titan_vlm.errors import ConfigError, DataError
from titan_vlm.evaluation.validate import has_held_out_data

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "cc12m-train-0000.tar"


def png(width=40, height=30, color=(200, 30, 30)):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


def write_jsonl(path, *records):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return str(path)


def source(kind, path, **options):
    return build_source(Data(source=kind, path=str(path), **options), "train", 0)


def llava(value="<image>\nWhat?", image="a.png", answer="Red."):
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"id": "r1", "image": image, "conversations": turns}


def openai(content, answer="Red."):
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ]
    }


def first_image(raw):
    return next(p["image"] for m in raw.messages for p in m["content"] if p["type"] == "image")


def kinds(raw, message=0):
    return [part["type"] for part in raw.messages[message]["content"]]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png(64, 48))
    return tmp_path


def test_llava_markers_become_image_parts_where_they_stand(folder):
    two = llava("Is <image> like <image>?", ["a.png", "b.png"])
    path = write_jsonl(folder / "d.jsonl", llava(), "\n", two)
    data = source("llava", path)
    assert len(data) == 2
    assert kinds(data[0]) == ["image", "text"]
    assert data[0].messages[0]["content"][1]["text"] == "\nWhat?"
    assert kinds(data[1]) == ["text", "image", "text", "image", "text"]
    assert data[1].origin == f"{path}:3"  # the blank line is counted, not read
    assert first_image(data[0]).header_size() == (40, 30)
    assert data[2].origin == data[0].origin  # the next epoch


def test_image_root_replaces_the_directory_of_the_file(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write_jsonl(elsewhere / "d.jsonl", llava())
    assert first_image(source("llava", path, image_root=str(folder))[0]).header_size() == (40, 30)
    with pytest.raises(DataError, match="a.png: cannot be read as an image"):
        first_image(source("llava", path)[0]).header_size()


def test_openai_parts_of_every_kind(folder):
    inline = "data:image/png;base64," + base64.b64encode(png(8, 6)).decode()
    content = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": {"url": f"file://{folder}/b.png"}},
        {"type": "image_url", "image_url": {"url": inline}},
        {"type": "image", "image": "b.png"},
        {"type": "video", "video": ["a.png"] * 4, "fps": 1.0},
        {"type": "text", "text": "Same?"},
    ]
    raw = source("openai", write_jsonl(folder / "d.jsonl", openai(content)))[0]
    assert kinds(raw) == ["image"] * 4 + ["video", "text"]
    sizes = [p["image"].header_size() for p in raw.messages[0]["content"][:4]]
    assert sizes == [(40, 30), (64, 48), (8, 6), (64, 48)]
    video = raw.messages[0]["content"][4]["video"]
    assert len(video.frames) == 4 and video.fps == 1.0
    assert raw.messages[1] == {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}


def test_directories_and_globs_are_read_in_the_order_of_names(folder):
    for name in ("2", "1"):
        write_jsonl(folder / f"{name}.jsonl", llava(answer=name), llava(answer=name + "b"))
    for path in (folder, folder / "*.jsonl"):
        data = source("llava", path)
        answers = [data[k].messages[1]["content"][0]["text"] for k in range(4)]
        assert answers == ["1", "1b", "2", "2b"]


def test_sources_can_be_sent_to_a_worker_after_use(folder):
    data = source("llava", write_jsonl(folder / "d.jsonl", llava()))
    before = data[0]
    again = pickle.loads(pickle.dumps(data))[0]
    assert again.messages[1] == before.messages[1]
    assert first_image(again).load_rgb().size == (40, 30)


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("llava", "{not json\n", r"d.jsonl:2: malformed JSON"),
        ("llava", "[1, 2]\n", r"d.jsonl:2: expected a JSON object, got list"),
        ("llava", {"image": "a.png"}, r'd.jsonl:2: the record needs "conversations"'),
        ("llava", llava("no marker"), r"d.jsonl:2: image-token mismatch: 0 .* for 1 image"),
        ("llava", llava("<image><image>"), r"d.jsonl:2: image-token mismatch: 2 .* for 1 image"),
        ("llava", llava(image=["a.png"] * 2), r"d.jsonl:2: image-token mismatch: 1 .* for 2"),
        (
            "llava",
            {"conversations": [{"from": "robot", "value": "x"}]},
            r'd.jsonl:2: from: "robot"',
        ),
        ("openai", {"text": "x"}, r'd.jsonl:2: the record needs "messages"'),
        ("openai", openai([{"type": "audio"}]), r'd.jsonl:2: part type "audio": expected text'),
        ("openai", openai(7), r"d.jsonl:2: content: expected a text or a list"),
        (
            "openai",
            openai([{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]),
            r"d.jsonl:2: https://example.org/a.png: remote files are not fetched; download it",
        ),
        (
            "openai",
            openai([{"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}]),
            r"d.jsonl:2: image: broken base64",
        ),
        ("openai", openai([{"type": "video", "video": []}]), r"d.jsonl:2: video: expected a file"),
    ],
)
def test_bad_records_name_their_file_and_line(folder, kind, record, message):
    good = llava() if kind == "llava" else openai("x")
    data = source(kind, write_jsonl(folder / "d.jsonl", good, record))
    assert data[0]
    with pytest.raises(DataError, match=message):
        data[1]


@pytest.mark.parametrize("damage", ["missing", "empty", "no image"])
def test_unreadable_picture_names_line_and_file_when_encoded(folder, damage):
    path = folder / "c.png"
    if damage != "missing":
        path.write_bytes(b"" if damage == "empty" else b"<html>not found</html>")
    data = source("llava", write_jsonl(folder / "d.jsonl", llava(image="c.png")))
    encoder = Encoder(load_tokenizer(), visual_spec(Data(min_pixels=1024)))
    with pytest.raises(DataError, match=r"d.jsonl:1: .*c.png: cannot be read as an image"):
        encoder.encode(data[0])


def test_truncated_picture_is_found_when_decoded(folder):
    whole = io.BytesIO()
    Image.effect_noise((200, 200), 90).convert("RGB").save(whole, "JPEG")
    (folder / "c.jpg").write_bytes(whole.getvalue()[:-2000])
    image = first_image(source("llava", write_jsonl(folder / "d.jsonl", llava(image="c.jpg")))[0])
    assert image.header_size() == (200, 200)
    with pytest.raises(DataError, match="c.jpg: broken image: .*truncated"):
        image.load_rgb()


def test_turned_photographs_are_seen_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 20)).save(folder / "t.jpg", exif=exif)
    image = first_image(source("llava", write_jsonl(folder / "d.jsonl", llava(image="t.jpg")))[0])
    assert image.header_size() == image.load_rgb().size == (20, 40)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_webdataset_pairs_pictures_with_txt_or_json_captions(tmp_path):
    write_tar(
        tmp_path / "0.tar",
        [
            ("x/001.png", png(10, 20)),
            ("x/001.txt", b" A caption. \n"),
            ("x/001.json", b'{"caption": "not this one"}'),
            ("x/002.json", b'{"caption": "From json."}'),
            ("x/002.PNG", png(30, 20)),
        ],
    )
    write_tar(tmp_path / "1.tar", [("001.webp", png()), ("001.txt", b"Third")])
    data = source("webdataset", tmp_path / "*.tar", caption_prompt="What?")
    assert len(data) == 3
    answers = [data[k].messages[1]["content"][0]["text"] for k in range(3)]
    assert answers == ["A caption.", "From json.", "Third"]
    assert [first_image(data[k]).header_size() for k in range(2)] == [(10, 20), (30, 20)]
    assert data[1].messages[0]["content"][1]["text"] == "What?"
    assert data[0].origin.endswith("0.tar:x/001")
    again = pickle.loads(pickle.dumps(data))
    assert first_image(again[2]).load_rgb().size == (40, 30)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("7.txt", b"x")], "0.tar:7: no picture"),
        ([("7.jpg", b"x")], "0.tar:7: no caption"),
        ([("7.jpg", b"x"), ("7.json", b"{")], "0.tar:7: malformed caption"),
        ([("7.jpg", b"x"), ("7.json", b'{"url": "y"}')], "0.tar:7: caption: expected a text under"),
        ([("7.jpg", b"x"), ("7.txt", b"\xff\xfe")], "0.tar:7: malformed caption"),
    ],
)
def test_bad_members_name_their_shard_and_key(tmp_path, members, message):
    data = source("webdataset", write_tar(tmp_path / "0.tar", members))
    with pytest.raises(DataError, match=message):
        data[0]


def test_compressed_or_broken_shards_are_refused(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a"), io.BytesIO())
    with pytest.raises(DataError, match="0.tar: not a plain tar file"):
        source("webdataset", tmp_path / "0.tar")


@pytest.mark.skipif(not PHOTOS.exists(), reason="needs the shared photographs")
def test_real_photographs_and_captions(tmp_path):
    data = source("webdataset", PHOTOS)
    assert len(data) == 32
    with tarfile.open(PHOTOS) as tar:
        captions = {
            member.name.split(".")[0]: tar.extractfile(member).read().decode().strip()
            for member in tar
            if member.name.endswith(".txt")
        }
    for index in range(32):
        raw = data[index]
        assert raw.meta["answer"] == captions[raw.origin.rpartition(":")[2]]
        image = first_image(raw)
        assert image.header_size() == image.load_rgb().size


def test_paths_that_name_nothing_are_refused(tmp_path):
    for kind in ("llava", "openai", "webdataset"):
        with pytest.raises(ConfigError, match="data.path: .*no such file, or no"):
            source(kind, tmp_path)
        with pytest.raises(ConfigError, match="data.path"):
            source(kind, "")


@pytest.mark.parametrize(
    ("data", "held_out", "said"),
    [
        (Data(), Eval(split="test"), '^eval.split: the digits have .* not "test"'),
        (Data("llava", "x"), Eval(path="nope.jsonl"), "^eval.path: nope.jsonl: no such file"),
        (Data("webdataset", "x"), Eval(path="nope.tar"), "^eval.path: nope.tar: no such file"),
    ],
)
def test_held_out_data_that_is_not_there_is_named_as_such(data, held_out, said):
    with pytest.raises(ConfigError, match=said):
        build_held_out(Config(data=data, eval=held_out))


class Table(list):
    """What HfSource uses of a datasets.Dataset, for rows of captions."""

    column_names = ("image", "text")
    features = {"image": "bytes"}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the package datasets: directories `plain` and `train_only` and `both`, and on
    the hub `org/both`."""

    class Splits(dict):
        pass

    png_row = {"image": {"bytes": png()}, "text": "train"}
    train, validation = Table([png_row]), Table([png_row | {"text": "validation"}])
    found = {
        "plain": train,
        "train_only": Splits(train=train),
        "both": Splits(train=train, validation=validation),
    }
    for name in found:
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)

    def load_from_disk(path):
        if Path(path).name not in found:
            raise FileNotFoundError("neither a Dataset nor a DatasetDict")
        return found[Path(path).name]

    def load_dataset(path, split):
        if path != "org/both":
            raise ConnectionError(f"cannot reach the hub for {path}")
        if split not in found["both"]:
            raise ValueError(f'Unknown split "{split}"')
        return found["both"][split]

    package = SimpleNamespace(
        Image=type("Image", (), {}),
        DatasetDict=Splits,
        load_from_disk=load_from_disk,
        load_dataset=load_dataset,
        get_dataset_split_names=lambda path: list(load_dataset(path, "train") and found["both"]),
    )
    monkeypatch.setitem(__import__("sys").modules, "datasets", package)


@pytest.mark.parametrize(
    ("path", "held_out", "expected"),
    [
        ("plain", Eval(), None),
        ("plain", Eval(path="plain"), None),  # its one table is what training reads
        ("plain", Eval(path="both"), "validation"),
        ("train_only", Eval(), None),
        ("train_only", Eval(path="plain", every=5), "train"),
        ("both", Eval(), "validation"),
        ("both", Eval(path="./both", every=5), "validation"),
        ("both", Eval(split="dev"), None),
        ("org/both", Eval(), "validation"),
        ("org/both", Eval(split="dev"), None),
    ],
)
@pytest.mark.usefixtures("package")
def test_hf_validates_where_there_is_a_split_or_a_path_held_out(path, held_out, expected, caplog):
    caplog.set_level("INFO")
    config = Config(data=Data("hf", path), eval=held_out)
    assert has_held_out_data(config) == (expected is not None)
    if expected:
        assert build_held_out(config)[0].meta["answer"] == expected
    else:
        assert f'no validation: {path} has no split "{held_out.split}"' in caplog.text


@pytest.mark.usefixtures("package")
def test_hf_takes_a_part_of_a_split_or_several_from_the_hub_as_held_out():
    config = Config(data=Data("hf", "org/both"), eval=Eval(split="train[95%:]+validation"))
    assert has_held_out_data(config)
    assert not has_held_out_data(replace(config, eval=Eval(split="train[95%:]+dev")))


@pytest.mark.usefixtures("package")
def test_hf_without_the_held_out_split_that_is_asked_for_is_refused(tmp_path):
    for path in ("plain", "train_only", "org/both"):
        config = Config(data=Data("hf", path), eval=Eval(split="dev", every=5))
        with pytest.raises(ConfigError, match=f'^eval.split = "dev": {path} has no .*every = 0'):
            has_held_out_data(config)
    (tmp_path / "empty").mkdir()
    for path, said in (
        ("empty", "^eval.path: empty was not written by save_to_disk"),
        ("nobody/nothing", "^eval.path: nobody/nothing is no directory, .* cannot reach the hub"),
    ):
        with pytest.raises(ConfigError, match=said):
            build_held_out(Config(data=Data("hf", "both"), eval=Eval(path=path)))
    with pytest.raises(ConfigError, match='^data.path: org/both .* gives no "dev".*Unknown split'):
        build_source(Data("hf", "org/both"), "dev", 0)
    with pytest.raises(ConfigError, match="^data.path: no/thing .* does not tell its splits"):
        has_held_out_data(Config(data=Data("hf", "no/thing")))


def test_sources_without_splits_validate_on_a_path_alone():
    for kind in ("llava", "openai", "webdataset"):
        assert not has_held_out_data(Config(data=Data(kind, "x")))
        assert has_held_out_data(Config(data=Data(kind, "x"), eval=Eval(path="y")))
    assert has_held_out_data(Config())


def test_hf_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match="pip install datasets"):
        source("hf", tmp_path)


class TestHuggingFaceDatasets:
    """Needs the optional package datasets."""

    @pytest.fixture
    def saved(self, tmp_path):
        datasets = pytest.importorskip("datasets")
        images = [{"bytes": png(10 + k, 20), "path": None} for k in range(3)]
        messages = [
            [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{k}?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": str(k)}]},
            ]
            for k in range(3)
        ]
        messages[2][0]["content"].pop(0)
        rows = {"image": images, "text": ["a", "b", None], "messages": messages}
        table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path)
        return tmp_path

    def test_captions(self, saved):
        data = source("hf", saved)
        assert (
            len(data) == 3 and len(build_source(Data(source="hf", path=str(saved)), "test", 0)) == 1
        )
        assert data[1].meta["answer"] == "b"
        assert first_image(data[1]).header_size() == (11, 20)
        with pytest.raises(DataError, match=":2: text: expected a text, got None"):
            data[2]

    def test_messages_take_the_pictures_of_the_image_column(self, saved):
        data = source("hf", saved, messages_column="messages")
        assert kinds(data[1]) == ["image", "text"]
        assert first_image(data[1]).load_rgb().size == (11, 20)
        with pytest.raises(DataError, match="image-token mismatch: 0 image part.* for 1 image"):
            data[2]

    def test_unknown_columns_and_splits_are_refused(self, saved):
        with pytest.raises(ConfigError, match='data.text_column = "body": .* has image, text'):
            source("hf", saved, text_column="body")
        with pytest.raises(ConfigError, match='data.split = "dev"'):
            build_source(Data(source="hf", path=str(saved)), "dev", 0)
