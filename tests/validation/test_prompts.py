from helpers.validation.prompts import named_prompts


def test_names_are_safe_short_and_unique():
    library = {"A/b": "one", "a b": "two", "../../etc": "three", "": "four", "x" * 300: "five", "写真": "six"}
    named = named_prompts("a cat & a dog", library)
    assert list(named.values()) == ["a cat & a dog", "one", "two", "three", "four", "five", "six"]
    assert all(name and len(name) < 80 and not set(name) & set("/.\\ &") for name in named)
    assert "a_cat_a_dog" in named and "写真" in named


def test_no_prompt_is_no_validation():
    assert named_prompts(None, {}) == {}
