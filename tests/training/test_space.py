import shutil

from helpers.training.space import Need, describe, shortages


def test_what_there_is_no_room_for_is_told_by_disk_and_the_rest_is_not(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    fitting, large = Need("result", 1, tmp_path), Need("checkpoints", 2 * free, tmp_path / "not" / "made" / "yet")
    assert shortages([fitting]) == []
    [line] = shortages([fitting, large])
    for words in ("checkpoints (", "result (", str(tmp_path), " will be needed", " free"):
        assert words in line


def test_needs_on_one_disk_are_added_up(tmp_path):
    lines = describe([Need("pixels", 2_000_000, tmp_path), Need("result", 3_000_000, tmp_path / "output")])
    assert "2.0 MB  pixels" in lines[1] and "3.0 MB  result" in lines[2] and "5.0 MB  in all" in lines[3]
