"""What a log shows of work that takes long."""

from keras_emr_cli import progress


def test_lines_of_a_log(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines = progress._Lines("square")
    told = []
    for seconds, done in [
        (0, 0),
        (30, 5),
        (61, 10),
        (90, 15),
        (7300, 40),
        (7400, 100),
        (7500, 100),
    ]:
        now[0] = float(seconds)
        told.append(lines.tell(done, 100))
    assert told == [
        None,
        None,
        "square  10 %, about 9 min 9 s left",
        None,
        "square  40 %, about 3 h 2 min left",
        "square  done in 2 h 3 min",
        None,
    ]
    now[0] = 0.0
    quick = progress._Lines("fgsm")
    assert quick.tell(1, 1) == "fgsm  done in 0 s"
    stuck = progress._Lines("fab")
    now[0] = 100.0
    assert stuck.tell(0, 9) == "fab  0 %"


def test_a_run_that_learned_nothing_is_told_so(capsys):
    from keras_emr_cli.progress import warn_of_chance

    warn_of_chance("trades", [{"val_accuracy": 0.5}, {"val_accuracy": 0.1}], 10)
    assert capsys.readouterr().err == ""
    warn_of_chance("trades", [{"val_accuracy": 0.08}, {"val_accuracy": 0.11}], 10)
    assert "trades has learned nothing: its validation accuracy never rose above 11.0%" in (
        capsys.readouterr().err
    )
