"""Plug-in scores: found by their entry points, run apart, kept, paired; and the CLIP score that comes along."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from bitroute.errors import JobError, RecipeError
from bitroute.eval.clip_score import ClipScore
from bitroute.eval.intervals import compare
from bitroute.eval.plugin import Chosen, judge
from bitroute.eval.sampling import Sample
from bitroute.eval.standalone import check, parse_score, parse_scores, standalone

PROMPTS = ("a red fox", "fog", "two empty chairs", "a storm over the sea", "rust", "a bicycle", "a tray of marbles")
SAMPLES = [Sample(index, prompt, seed) for index, prompt in enumerate(PROMPTS) for seed in (0, 1)]
ENTRY_POINTS = """
[bitroute.scores]
redness = example_scores:Redness
absent = example_scores_that_are_not_there:Score
unbuilt = example_scores:Unbuilt
untitled = example_scores:Untitled
failing = example_scores:Failing
endless = example_scores:Endless
leaving = example_scores:Leaving
clip = bitroute.eval.clip_score:ClipScore
"""
PLUG_INS = '''
import os, sys

class Redness:
    """Mean of the red channel, plus the prompt's length where the argument says so."""
    title = "redness"
    higher_is_better = False

    def __init__(self, argument):
        print("building", argument)
        self.with_prompt = argument == "prompt"
        with open(os.environ["SCORES_LOG"], "a") as log:
            log.write(f"{os.getpid()}\\n")

    def score(self, picture, prompt):
        red = picture.getchannel("R").histogram()
        return sum(i * n for i, n in enumerate(red)) / sum(red) + self.with_prompt * len(prompt)

class Unbuilt(Redness):
    def __init__(self, argument):
        raise FileNotFoundError(f"no weights in {argument}")

class Untitled:
    higher_is_better = True
    def __init__(self, argument): pass
    def score(self, picture, prompt): return 0.0

class Failing(Untitled):
    title = "failing"
    def score(self, picture, prompt): raise RuntimeError("out of \\n luck")

class Endless(Failing):
    def score(self, picture, prompt): return float("inf")

class Leaving(Failing):
    def score(self, picture, prompt): sys.exit(0)
'''
Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a distribution of that version on the path, for this process and for those that it starts."""
    paths = os.environ.get("PYTHONPATH")

    def install(version: str) -> None:
        site = tmp_path / f"site-{version}"
        information = site / f"example_scores-{version}.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: example-scores\nVersion: {version}\n")
        (information / "entry_points.txt").write_text(ENTRY_POINTS)
        (site / "example_scores.py").write_text(PLUG_INS)
        monkeypatch.syspath_prepend(site)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *([paths] if paths else [])]))

    monkeypatch.setenv("SCORES_LOG", str(tmp_path / "log"))
    install("1.0")
    return install


@pytest.fixture
def processes(tmp_path: Path) -> Callable[[], list[int]]:
    """The processes in which a plug-in was built so far."""
    log = tmp_path / "log"
    return lambda: [int(line) for line in log.read_text().split()] if log.exists() else []


def draw(folder: Path, reds: Sequence[int]) -> Path:
    folder.mkdir(exist_ok=True)
    for sample, red in zip(SAMPLES, reds, strict=True):
        Image.new("RGB", (8, 8), (red, 10, 20)).save(folder / f"{sample.stem}.png")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """The pictures of an original and of a candidate that draws each 3 or 5 redder."""
    reds = [10 * place for place in range(len(SAMPLES))]
    redder = [red + (3 if sample.seed else 5) for red, sample in zip(reds, SAMPLES, strict=True)]
    return draw(tmp_path / "original", reds), draw(tmp_path / "candidate", redder)


def test_a_score_is_chosen_by_its_name_and_takes_the_rest_as_its_argument(install: Install) -> None:
    assert parse_score("redness") == parse_score("redness=") == Chosen("redness", None)
    assert parse_score("clip=./models/clip=b16") == Chosen("clip", "./models/clip=b16")
    assert parse_score("clip=./models/clip").label == "clip=clip"
    assert parse_score("absent") == Chosen("absent")
    assert parse_scores(["redness", "redness=prompt"]) == (Chosen("redness"), Chosen("redness", "prompt"))


def test_an_unknown_score_is_refused_with_what_is_installed(install: Install) -> None:
    with pytest.raises(RecipeError) as error:
        parse_score("rednes=3")
    text = str(error.value)
    assert "no score 'rednes' is installed" in text
    assert "absent, clip, endless" in text
    assert "did you mean 'redness'? or install a package that brings it" in text
    assert "entry-point group bitroute.scores" in text


def test_two_scores_of_one_name_are_refused(install: Install) -> None:
    with pytest.raises(RecipeError, match="two scores of one name"):
        parse_scores(["clip=./a/clip", "clip=./b/clip"])


def test_the_scores_are_means_and_their_difference_is_paired(install: Install, runs: tuple[Path, Path]) -> None:
    found = standalone([Chosen("redness"), Chosen("redness", "prompt")], *runs, SAMPLES)
    assert list(found) == ["redness", "redness=prompt"]
    plain, with_prompt = found.values()
    assert (plain["title"], plain["higher_is_better"]) == ("redness", False)
    assert (plain["original"], plain["candidate"]) == (65.0, 69.0)
    assert with_prompt["original"] == pytest.approx(65 + sum(map(len, PROMPTS)) / len(PROMPTS))
    difference = compare([5, 3] * len(PROMPTS), [0] * len(SAMPLES), [sample.prompt_index for sample in SAMPLES])
    assert plain["difference"] == with_prompt["difference"] == {"value": 4, "low": 4, "high": 4, "prompts": 7}
    assert plain["p"] == with_prompt["p"] == difference.p == 2 / 2**7


def test_scores_are_computed_in_a_process_of_their_own_and_kept(
    install: Install, runs: tuple[Path, Path], processes: Callable[[], list[int]]
) -> None:
    first = standalone([Chosen("redness")], *runs, SAMPLES)
    assert len(set(processes()) - {os.getpid()}) == 2
    assert standalone([Chosen("redness")], *runs, SAMPLES) == first
    assert len(processes()) == 2
    Image.new("RGB", (8, 8), (255, 0, 0)).save(runs[1] / f"{SAMPLES[0].stem}.png")
    assert standalone([Chosen("redness")], *runs, SAMPLES)["redness"]["candidate"] > first["redness"]["candidate"]
    assert len(processes()) == 3
    for file in runs[0].glob("score-*.json"):
        file.write_text("{")
    assert standalone([Chosen("redness")], *runs, SAMPLES)["redness"]["original"] == 65.0
    assert len(processes()) == 4


def test_another_version_and_another_file_behind_the_argument_are_scored_anew(
    install: Install, runs: tuple[Path, Path], tmp_path: Path, processes: Callable[[], list[int]]
) -> None:
    original = runs[0]
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_bytes(b"one")
    chosen = [Chosen("redness", str(model))]
    standalone(chosen, original, original, SAMPLES)
    (model / "weights").write_bytes(b"another")
    standalone(chosen, original, original, SAMPLES)
    install("1.1")
    standalone(chosen, original, original, SAMPLES)
    assert len(processes()) == 3


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        (Chosen("absent"), "ModuleNotFoundError: No module named 'example_scores_that_are_not_there'"),
        (Chosen("unbuilt", "./here"), r"FileNotFoundError: no weights in \./here"),
        (Chosen("untitled"), "AttributeError: 'Untitled' object has no attribute 'title'"),
    ],
)
def test_a_plug_in_that_cannot_be_built_is_named_before_anything_is_drawn(
    install: Install, chosen: Chosen, reason: str
) -> None:
    with pytest.raises(JobError, match=reason) as error:
        check(chosen)
    assert f"the score '{chosen.name}' of example-scores 1.0 cannot be computed" in str(error.value)
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("failing", "RuntimeError: out of luck"),
        ("endless", r"inf for 0000-0\.png, not a finite number"),
        ("leaving", "its process ended before it had written the scores"),
    ],
)
def test_a_plug_in_that_does_not_score_is_named(
    install: Install, runs: tuple[Path, Path], name: str, reason: str
) -> None:
    with pytest.raises(JobError, match=reason) as error:
        standalone([Chosen(name)], *runs, SAMPLES)
    assert f"the score '{name}' of example-scores 1.0 cannot be computed" in str(error.value)
    assert list(runs[0].glob("score-*")) == []


def test_a_missing_picture_is_a_job_error(install: Install, runs: tuple[Path, Path]) -> None:
    (runs[0] / f"{SAMPLES[3].stem}.png").unlink()
    with pytest.raises(JobError, match=r"0001-1\.png"):
        standalone([Chosen("redness")], *runs, SAMPLES)


@pytest.mark.parametrize(
    ("count", "scored"),
    [(1, [0]), (3, [0, 1, 2]), (8, list(range(8))), (20, [0, 3, 5, 8, 11, 14, 16, 19])],
)
def test_a_video_has_the_mean_score_of_up_to_eight_even_frames(
    install: Install, tmp_path: Path, count: int, scored: list[int]
) -> None:
    frames = [Image.new("RGB", (8, 8), (index, 0, 0)) for index in range(count)]
    frames[0].save(tmp_path / "video.png", save_all=True, append_images=frames[1:])
    found = judge(Chosen("redness"), [(str(tmp_path / "video.png"), "")])
    assert found["values"] == [pytest.approx(sum(scored) / len(scored))]


def test_the_plug_in_of_the_documentation_works() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scores.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    made = names["Brightness"](None)
    assert (made.title, made.higher_is_better) == ("mean brightness", True)
    assert made.score(Image.new("RGB", (8, 8), (7, 7, 7)), "fog") == 7


@pytest.fixture(scope="module")
def make_clip(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Writes a small random CLIP; of sign -1 it has the same text embeddings the other way round."""

    def make_clip(sign: int) -> Path:
        folder = tmp_path_factory.mktemp("models") / "clip-tiny"
        tokenizer = AutoTokenizer.from_pretrained(tiny / "tokenizer")
        small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        words = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
        config = CLIPConfig(
            text_config={**small, **words, "max_position_embeddings": 77},
            vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=16,
        )  # fmt: skip
        torch.manual_seed(0)
        model = CLIPModel(config)
        with torch.no_grad():
            model.text_projection.weight.mul_(sign)
        sizes: dict[str, Any] = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        for part in (model, tokenizer, CLIPImageProcessorPil(**sizes)):
            part.save_pretrained(folder)
        return folder

    return make_clip


@pytest.fixture
def picture() -> Image.Image:
    noise = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(noise.numpy())


def test_the_clip_score_is_a_hundred_times_the_cosine_and_never_negative(
    make_clip: Callable[[int], Path], picture: Image.Image
) -> None:
    folder = make_clip(1)
    made = ClipScore(str(folder))
    assert (made.title, made.higher_is_better) == ("CLIP score (clip-tiny)", True)
    model = CLIPModel.from_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)("a red fox", return_tensors="pt")
    mean, std = (
        torch.tensor(CLIPImageProcessorPil.from_pretrained(folder).to_dict()[f"image_{k}"]) for k in ("mean", "std")
    )
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(1, 32, 32, 3) / 255
    with torch.no_grad():
        text = model.text_projection(model.text_model(**words).pooler_output)
        image = model.visual_projection(model.vision_model(((pixels - mean) / std).permute(0, 3, 1, 2)).pooler_output)
    cosine = torch.cosine_similarity(text, image).item()
    scores = made.score(picture, "a red fox"), ClipScore(str(make_clip(-1))).score(picture, "a red fox")
    assert sorted(scores) == [0.0, pytest.approx(100 * abs(cosine), rel=1e-4)]
    assert scores.index(0.0) == (1 if cosine > 0 else 0)
    assert abs(cosine) > 0.01


def test_the_clip_score_reads_no_more_than_77_tokens(make_clip: Callable[[int], Path], picture: Image.Image) -> None:
    positive = next(made for sign in (1, -1) if (made := ClipScore(str(make_clip(sign)))).score(picture, "fox " * 100))
    assert positive.score(picture, "fox " * 100) == positive.score(picture, "fox " * 100 + "and a hen")
    assert positive.score(picture, "fox " * 20) != positive.score(picture, "fox " * 20 + "and a hen")


def test_the_clip_score_works_as_a_plug_in_of_bitroute(
    install: Install, runs: tuple[Path, Path], make_clip: Callable[[int], Path]
) -> None:
    folder = make_clip(1)
    found = standalone([parse_score(f"clip={folder}")], runs[0], runs[0], SAMPLES)["clip=clip-tiny"]
    made = ClipScore(str(folder))
    by_hand = [made.score(Image.open(runs[0] / f"{s.stem}.png").convert("RGB"), s.prompt) for s in SAMPLES]
    assert found["original"] == found["candidate"] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
    assert (found["difference"]["value"], found["p"]) == (0, 1)


def test_a_folder_that_holds_only_a_part_of_clip_is_refused(tiny: Path) -> None:
    with pytest.raises(ValueError, match=r"tensors of a CLIP model are not in .*text_encoder"):
        ClipScore(str(tiny / "text_encoder"))


def test_the_clip_score_asks_for_its_model() -> None:
    with pytest.raises(ValueError, match="Give its folder or its name on the Hub"):
        ClipScore(None)


def test_a_model_that_is_not_here_is_one_line_without_a_network(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(JobError, match="the score 'clip'") as error:
        check(Chosen("clip", "openai/no-such-clip"))
    assert str(error.value).startswith("openai/no-such-clip: ")
    assert "\n" not in error.value.problems[0].got
