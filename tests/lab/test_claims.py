import pandas as pd
import pytest
import yaml

from kdlib.lab import claims
from kdlib.lab.notebooks import ROOT

ROW = {"method": "posterior", "against": "pseudo-labels", "difference": 2.0, "low": 1.0}
ROW |= {"high": 3.0, "seeds_low": 0.5, "seeds_high": 3.5}


@pytest.mark.parametrize(
    ("row", "bears"),
    [
        ({}, "more"),
        ({"seeds_low": -0.5}, "open"),  # other seeds might not agree
        ({"difference": -2.0, "low": -3, "high": -1, "seeds_low": -4, "seeds_high": -0.1}, "less"),
        ({"low": -0.2, "high": 0.3, "seeds_low": -0.4, "seeds_high": 0.4}, "equal"),
        ({"low": -0.2, "high": 0.3, "seeds_low": -1}, "open"),
        ({"verdict": "not shown"}, "open"),  # the table's own, stricter one
        ({"verdict": "equal"}, "equal"),
    ],
)
def test_what_a_row_bears(row, bears):
    assert claims.borne(pd.Series(ROW | row)) == bears


def made(folder, claimed="more", **row):
    for name in ("notebooks", "figures/x"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pd.DataFrame([ROW | row]).to_csv(folder / "figures/x/t.csv", index=False)
    claim = {"says": "Soft wins.", "table": "x/t.csv", "row": {"method": "posterior"}, "seeds": 3}
    (folder / "notebooks/claims.yaml").write_text(yaml.safe_dump({"c": claim | {"bears": claimed}}))
    return claims.write(folder)


def test_a_claim_that_its_table_does_not_bear_is_told(tmp_path):
    (row,) = made(tmp_path).to_dict("records")
    assert (row["verdict"], row["named"], row["holds"], row["seeds"]) == ("shown", False, True, 3)
    assert made(tmp_path, holm=0.01, verdict="shown").loc[0, "named"]  # a table of notebook 05
    assert row["figure"] == ""
    (tmp_path / "figures/x/t.svg").touch()
    assert made(tmp_path).loc[0, "figure"] == "x/t.svg"
    assert not made(tmp_path, "equal").loc[0, "holds"]
    with pytest.raises(ValueError, match=r"claim c: expected one row of x/t.csv, got 0"):
        made(tmp_path, method="other")


def test_numbers_in_a_text_come_from_the_claim(tmp_path):
    text = "by <!-- claim c -->9.99 [8, 7]<!-- --> points"
    assert claims.fill(text, made(tmp_path)) == (
        "by <!-- claim c -->+2.00 [1.00, 3.00] (shown)<!-- --> points"
    )
    with pytest.raises(KeyError, match="unknown"):
        claims.fill("<!-- claim unknown --><!-- -->", made(tmp_path))


def test_every_sentence_of_the_study_is_borne_by_its_table():
    found = claims.checked()
    assert found.loc[~found["holds"], "claim"].tolist() == []
    committed = (ROOT / "figures" / "claims.csv").read_text()
    assert committed == found.to_csv(index=False, lineterminator="\n")
    readme = (ROOT / "README.md").read_text()
    assert claims.fill(readme, found) == readme
