from samq.tools.markdown_table import line, table


def test_a_line_has_a_bar_on_both_sides_and_between_its_cells() -> None:
    assert line(["a", "b"]) == "| a | b |"


def test_a_table_is_its_header_a_rule_of_the_same_width_and_its_lines() -> None:
    assert table(["model", "ms"], [["tiny", "1.5"], ["large", "4.0"]]) == (
        "| model | ms |\n| --- | --- |\n| tiny | 1.5 |\n| large | 4.0 |\n"
    )


def test_a_table_without_lines_keeps_its_header() -> None:
    assert table(["model"], []) == "| model |\n| --- |\n"
