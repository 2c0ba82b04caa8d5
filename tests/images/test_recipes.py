import io

import pytest
from PIL import Image, PngImagePlugin

from helpers.images.recipes import KEY, LONGEST, NoRecipe, compared, read_recipe, save_png

RECIPE = {"prompt": 'a "purple" heart,\nмир 🟣', "seed": 3, "stages": [{"steps": 27}]}


@pytest.fixture
def picture() -> Image.Image:
    return Image.effect_noise((24, 16), 80).convert("RGB")


def test_what_was_written_is_read_and_the_pixels_stay(tmp_path, picture):
    save_png(picture, tmp_path / "a.png", RECIPE)
    assert read_recipe(tmp_path / "a.png") == RECIPE
    assert Image.open(tmp_path / "a.png").tobytes() == picture.tobytes()


def test_equal_recipes_give_equal_bytes_in_whatever_order(tmp_path, picture):
    save_png(picture, tmp_path / "a.png", RECIPE)
    save_png(picture, tmp_path / "b.png", dict(reversed(RECIPE.items())))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "no recipe is in it"), ("{", "damaged"), ("[1]", "damaged"), ("[" * 100_000, "damaged"),
     ("x" * (LONGEST + 1), "letters")],
)  # fmt: skip
def test_what_is_no_recipe_is_refused_in_words(tmp_path, picture, text, words):
    chunks = PngImagePlugin.PngInfo()
    if text:
        chunks.add_itxt(KEY, text)
    picture.save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(NoRecipe, match=words):
        read_recipe(tmp_path / "a.png")


def test_other_files_and_cut_ones_are_refused_in_words(tmp_path, picture):
    picture.save(tmp_path / "a.jpg")
    (tmp_path / "text.png").write_text("no picture")
    save_png(picture, tmp_path / "cut.png", RECIPE)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:40])
    for name in ("a.jpg", "text.png", "cut.png"):
        with pytest.raises(NoRecipe):
            read_recipe(tmp_path / name)


def test_a_recipe_that_unpacks_to_too_much_is_refused(tmp_path, picture):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(KEY, "x" * 3_000_000, zip=True)
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=chunks)
    (tmp_path / "a.png").write_bytes(file.getvalue())
    with pytest.raises(NoRecipe):
        read_recipe(tmp_path / "a.png")


def test_it_is_told_whether_a_picture_came_out_the_same(tmp_path, picture):
    save_png(picture, tmp_path / "a.png", {"seed": 1})
    save_png(picture, tmp_path / "b.png", {"seed": 1})
    assert compared(tmp_path / "b.png", tmp_path / "a.png") == f"The same bytes as {tmp_path / 'a.png'}."
    save_png(picture, tmp_path / "b.png", {"seed": 2})
    assert "The same pixels as" in compared(tmp_path / "b.png", tmp_path / "a.png")
    other = picture.copy()
    r, g, b = other.getpixel((0, 0))
    other.putpixel((0, 0), (r, g, b - 3 if b > 3 else b + 3))
    save_png(other, tmp_path / "b.png", {})
    share = 1 / (3 * picture.width * picture.height)
    assert f"up to 3 of 255 apart, in {share:.1%} of its values" in compared(tmp_path / "b.png", tmp_path / "a.png")
    save_png(picture.resize((3, 2)), tmp_path / "b.png", {})
    assert f"that has {picture.width}x{picture.height} pixels" in compared(tmp_path / "b.png", tmp_path / "a.png")
