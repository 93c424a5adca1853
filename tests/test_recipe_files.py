"""Recipes that are damaged, or made to do harm: one sentence, and soon."""

import pytest

from secateur.errors import PlanError
from secateur.recipe import read_recipe

BOMB = "a: &a [1, 1]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: 'a\0b'", "line 1: special characters are not allowed"),
        ('sparsity: 0.5\nmodel: "a\\0b"', "line 2: it has a zero byte"),
        ('sparsity: 0.5\ncalibration: ["a\\0b"]', "line 2: it has a zero byte"),
        ("sparsity: 0.5\nmodel: " + "x" * 5000, "line 2: it has text of more than 1000 characters"),
        ("sparsity: " + "9" * 5000, "text of more than 1000 characters"),
        ("sparsity: 0.5\nsamples: 1" + "0" * 30, "'samples': input should be less than or equal to"),
        ("sparsity: 0.5\nseed: 1" + "0" * 30, "'seed': input should be less than"),
        ("sparsity: 0.5\nowl: {multiple: .inf}", "'multiple': input should be a finite number"),
        ("criterion: sparsegpt\noptions: {damp: .nan}", "option damp of sparsegpt: input should be a finite number"),
        ("a: " + "[" * 2000, "nested more than 32 deep"),
        ("- " * 3000, "nested more than 32 deep"),
        ("&a [*a]", "nested more than 32 deep"),
        (BOMB, "it has more than 10000 values"),
        ("sparsity: 2001-14-99", "is no recipe: month must be"),
        ("seed: !!timestamp abc", "is no recipe"),
        ("seed: !!int ''", "is no recipe"),
        ("seed: !!bool abc", "is no recipe"),
        ("#" * 2**21, "is more than 1048576"),
    ],
)
def test_a_recipe_that_is_refused(text, message, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(PlanError, match=message) as caught:
        read_recipe(tmp_path / "recipe.yaml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_aliases_are_taken(tmp_path):
    (tmp_path / "recipe.yaml").write_text("sparsity: &half 0.5\nreconstruct: {rate: *half}")
    assert read_recipe(tmp_path / "recipe.yaml").reconstruct.rate == 0.5
