"""Pictures that pipelines are given: which file goes to which prompt, and files that are none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from bitroute.errors import JobError, RecipeError
from bitroute.eval.generate import save_frames
from bitroute.eval.inputs import inputs_for, open_input, parse_inputs
from bitroute.eval.sampling import Sampling


def write(file: Path, red: int = 0) -> str:
    file.parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 3), (red, 0, 0)).save(file)
    return str(file)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three pictures, whose red is their number, and what else lies in folders."""
    for number in (2, 0, 1):
        write(tmp_path / "photos" / f"{number}.png", number)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return tmp_path / "photos"


def reds(files: tuple[str, ...]) -> list[object]:
    found = [inputs_for({"image": files}, index)["image"] for index in range(3)]
    return [picture.getpixel((0, 0))[0] for picture in found]  # type: ignore[union-attr,index]


def test_one_picture_is_for_all_prompts_and_those_of_a_folder_go_by_name(photos: Path) -> None:
    found = parse_inputs([f"image={photos}", f"mask_image={photos / '1.png'}"], 3)
    assert reds(found["image"]) == [0, 1, 2]
    assert reds(found["mask_image"]) == [1, 1, 1]


def test_an_argument_that_comes_again_adds_its_pictures(photos: Path) -> None:
    assert reds(parse_inputs([f"image={photos / name}.png" for name in "210"], 3)["image"]) == [2, 1, 0]


def test_files_get_absolute_names(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    assert parse_inputs(["image=0.png"], 1) == {"image": (str(photos / "0.png"),)}


@pytest.mark.parametrize("text", ["", "image", "image=", "=photo.png", "two words=photo.png"])
def test_what_is_no_input_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="ARGUMENT=FILE"):
        parse_inputs([text], 1)


def test_everything_that_is_wrong_is_said_at_once(photos: Path) -> None:
    texts = ["what", f"image={photos / 'none.png'}", f"mask_image={photos / 'notes.txt'}", f"control={photos}"]
    with pytest.raises(RecipeError) as error:
        parse_inputs(texts, 2)
    said = [problem.what for problem in error.value.problems]
    assert said == [
        "not an input",
        "no such picture",
        "this is not a picture",
        "wrong number of pictures for 'control'",
    ]
    assert "one picture for all prompts, or 2: one for each" in str(error.value)


def test_a_folder_without_pictures_has_the_wrong_number(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="wrong number of pictures"):
        parse_inputs([f"image={tmp_path}"], 1)


def test_half_a_picture_is_none(photos: Path) -> None:
    content = (photos / "0.png").read_bytes()
    (photos / "0.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(RecipeError, match="not a picture"):
        parse_inputs([f"image={photos / '0.png'}"], 1)


def test_a_picture_that_lies_on_its_side_is_turned_and_has_three_colours(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    Image.new("L", (4, 3)).save(tmp_path / "turned.jpg", exif=exif)
    found = open_input(str(tmp_path / "turned.jpg"))
    assert isinstance(found, Image.Image)
    assert (found.size, found.mode) == ((3, 4), "RGB")


def test_an_animation_is_the_list_of_its_frames(tmp_path: Path) -> None:
    save_frames([Image.new("RGB", (4, 3), (red, 0, 0)) for red in (7, 7, 9)], tmp_path / "clip.png")
    found = open_input(str(tmp_path / "clip.png"))
    assert isinstance(found, list)
    assert [frame.getpixel((0, 0)) for frame in found] == [(7, 0, 0), (7, 0, 0), (9, 0, 0)]


def test_a_file_that_went_away_is_named_without_its_folder(photos: Path) -> None:
    for read in (open_input, lambda file: Sampling(("a",), inputs={"image": [file]}).describe()):
        with pytest.raises(JobError, match=r"gone\.png: an input picture cannot be read") as error:
            read(str(photos / "gone.png"))
        assert str(photos) not in str(error.value)


def test_reports_name_the_pictures_and_their_content_but_not_their_folder(photos: Path) -> None:
    described = Sampling(("a",), inputs=parse_inputs([f"image={photos / '0.png'}"], 1)).describe()
    assert described["inputs"] == {"image": ["0.png"]}
    assert len(described["inputs_sha256"]["image"][0]) == 64
    assert str(photos) not in json.dumps(described)


def test_the_key_follows_the_content_and_not_the_place(tiny: Path, photos: Path, tmp_path: Path) -> None:
    sampling = Sampling(("a",), inputs={"image": [str(photos / "0.png")]})
    moved = replace(sampling, inputs={"image": [write(tmp_path / "elsewhere" / "0.png", 0)]})
    other = replace(sampling, inputs={"mask_image": [str(photos / "0.png")]})
    before = sampling.key(tiny)
    assert moved.key(tiny) == before != other.key(tiny)
    write(photos / "0.png", 200)
    assert sampling.key(tiny) != before
