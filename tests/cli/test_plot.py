"""The command that draws runs, through its command line on real runs; its page in a real browser."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_psft.cli.plot import main
from tests.support import oracle, tiny
from tests.support.cli import REPOSITORY, Exit, run_cli

ALWAYS = {"loss", "nll", "entropy", "grad_norm", "lr", "tokens_per_second", "step_seconds"}
CLIP = {"clip_fraction", "approx_kl", "old_policy_share"}
CLIP |= {f"ratio_{name}" for name in ("mean", "p05", "p50", "p95", "max")}
VALID = {"valid_nll", "valid_entropy"}
PAIRS = {"margin", "accuracy", "chosen_log_probs", "rejected_log_probs"}


@pytest.fixture(scope="module")
def runs(pool, tmp_path_factory) -> Path:
    """A folder of three runs: psft with all that it can log, sft and dpo."""
    folder = tmp_path_factory.mktemp("runs")
    tiny.build_model(folder / "model", "qwen2", num_hidden_layers=2)
    tiny.build_tokenizer(folder / "tokenizer")
    tiny.write_records(folder / "records.jsonl", 40)
    pairs = [
        {"prompt": "add one", "chosen": f"two {word}", "rejected": f"{word} x"} for word in ("one", "two", "three")
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs * 4))
    common = ["--load-hf", folder / "model", "--tokenizer", folder / "tokenizer", "--lr", oracle.PARITY_LR]
    common += ["--global-batch-size", 4, "--no-packing"]
    records = ["--data", folder / "records.jsonl"]
    valid = ["--valid-data", folder / "records.jsonl", "--eval-interval", 4, "--eval-iters", 1]
    flags = {
        "psft": [*records, *valid, "--train-iters", 12, "--old-policy-interval", 4, "--log-clipped-tokens", 5],
        "sft": [*records, "--train-iters", 10, "--objective", "sft"],
        "dpo": ["--data", folder / "pairs.jsonl", "--train-iters", 3, "--objective", "dpo"],
    }
    for name, own in flags.items():
        (exit,) = pool.run(run_cli, 1, [str(value) for value in (*common, *own, "--save", folder / name)])
        assert exit.code == 0, exit.err
    return folder


@pytest.fixture
def plot(capsys):
    def run(*words: object) -> Exit:
        return Exit(main([str(word) for word in words]), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def report(runs) -> Path:
    """The report of all three, as a user makes it."""
    command = [sys.executable, "-m", "megatron_psft", "plot", *(str(runs / name) for name in ("psft", "sft", "dpo"))]
    done = subprocess.run(
        [*command, "--out", str(runs / "new" / "report")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"3 runs, 25 steps: {runs}/new/report/report.html\n"
    assert done.stderr == ""
    return runs / "new" / "report"


def test_every_metric_has_its_picture(report):
    pictures = {path.stem for path in report.glob("*.png")}
    assert pictures == ALWAYS | CLIP | VALID | PAIRS
    assert {path.name for path in report.iterdir()} == {"report.html"} | {f"{name}.png" for name in pictures}


def test_a_run_without_an_old_policy_has_no_charts_of_it(plot, runs, tmp_path):
    exit = plot(runs / "sft", "--out", tmp_path)
    assert (exit.code, exit.err) == (0, "")
    assert {path.stem for path in tmp_path.glob("*.png")} == ALWAYS
    page = (tmp_path / "report.html").read_text()
    assert "Most clipped tokens" not in page
    assert "These runs differ" not in page
    assert "settings" in page


def test_another_call_follows_a_live_run(plot, runs, tmp_path):
    live = tmp_path / "live"
    shutil.copytree(runs / "sft", live)
    whole = (live / "metrics.jsonl").read_text().splitlines(keepends=True)
    for count, half in ((4, ""), (9, whole[9][:30])):
        (live / "metrics.jsonl").write_text("".join(whole[:count]) + half)
        exit = plot("--out", tmp_path / "out", "--runs", live, "--smooth", 1)
        assert exit.out == f"1 run, {count} steps: {tmp_path}/out/report.html\n"
        assert f"<td>{count} of 10</td>" in (tmp_path / "out" / "report.html").read_text()


def test_text_from_runs_is_shown_and_not_obeyed(plot, runs, tmp_path):
    """A token, a folder and a setting that look like HTML."""
    evil = tmp_path / "<script>alert(1)<"
    shutil.copytree(runs / "psft", evil, ignore=shutil.ignore_patterns("step_*"))
    content = json.loads((evil / "clipped_tokens.json").read_text())
    content["tokens"][0]["text"] = "</script><b>"
    (evil / "clipped_tokens.json").write_text(json.dumps(content))
    (evil / "config.yaml").write_text("data: ['<i>']\n")
    assert plot(evil, runs / "sft", "--out", tmp_path / "out").code == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2
    assert "&lt;/script&gt;&lt;b&gt;" in page
    assert "[&#34;&lt;i&gt;&#34;]" in page
    assert "<b>" not in page
    assert "<i>" not in page


def test_values_that_are_not_finite_are_counted(plot, runs, tmp_path):
    shutil.copytree(runs / "sft", tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 11, "loss": 1.0, "nll": NaN, "entropy": Infinity}\n')
    assert plot(tmp_path / "run", "--out", tmp_path / "out").code == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("run: 1 value is nan or infinite and not drawn.") == 2


def spoil(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][:-9] + "\n", *lines[2:]]))


def test_mistakes_are_one_line_and_code_2(plot, runs, tmp_path):
    shutil.copytree(runs / "sft", tmp_path / "spoilt")
    spoil(tmp_path / "spoilt" / "metrics.jsonl")
    (tmp_path / "file").write_text("")
    good, out = runs / "sft", ("--out", tmp_path / "out")
    mistakes = [
        ([runs / "none", *out], f"runs ({runs}/none) must be folders that hold a metrics.jsonl"),
        ([good, runs / "model", *out], f"runs ({runs}/model) must be folders that hold a metrics.jsonl"),
        ([good, tmp_path / "spoilt", *out], f"{tmp_path}/spoilt/metrics.jsonl:2 is not JSON"),
        ([good, good, *out], "is given 2 times"),
        ([*(tmp_path / f"{number}" for number in range(22)), *out], "runs (22) must be at most 21"),
        ([good, "--out", tmp_path / "file"], "must be a folder that can be written: a file has this name"),
        ([good], "missing --out"),
        (out, "missing --runs"),
        ([good, *out, "--smooth", 0], "smooth (0) must be at least 1"),
        ([good, *out, "--smoth", 2], "unknown argument --smoth; did you mean --smooth?"),
    ]
    for words, message in mistakes:
        exit = plot(*words)
        assert exit.code == 2, message
        assert exit.err.startswith("error: ")
        assert exit.err.count("\n") == 1
        assert message in exit.err
    assert not (tmp_path / "out").exists()


def test_help_has_examples_and_needs_no_matplotlib():
    command = [sys.executable, "-X", "importtime", "-m", "megatron_psft", "plot", "--help"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "    psft plot runs/first --out runs/first/report\n" in done.stdout
    assert " matplotlib\n" not in done.stderr
    assert " torch\n" not in done.stderr


SIZES = {"phone": (390, 844), "desktop": (1280, 900), "paper": (702, 1020)}  # A4 within its margins, in CSS pixels

OUTSIDE = """
const wide = document.documentElement.clientWidth;
const name = (element) => `${element.tagName} ${element.className} ${element.textContent.slice(0, 40)}`;
return [...document.body.querySelectorAll("*")].filter((element) => {
  const { left, right, width } = element.getBoundingClientRect();
  const scrolls = element.parentElement.closest(".scroll");
  return width && !scrolls && (left < -0.5 || right > wide + 0.5);
}).map(name);
"""
CELLS = "return [...document.querySelectorAll(arguments[0])].map((row) => [...row.children].map((c) => c.innerText))"
LABELS = """
return [...document.querySelectorAll("figure svg")].map((svg) => {
  const box = ({ left, top, right, bottom }) => [left, top, right, bottom];
  const all = (selector) => [...svg.querySelectorAll(selector)];
  const texts = all("text").map((text) => [text.textContent, ...box(text.getBoundingClientRect())]);
  const paths = all('[id*="line2d"] path[clip-path]').map((path) => box(path.getBoundingClientRect()));
  return { picture: box(svg.getBoundingClientRect()), texts, paths };
});
"""


@pytest.fixture(scope="module")
def browser():
    """A driver of Debian's chromium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromium-driver (apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture(params=SIZES)
def page(request, browser, report):
    width, height = SIZES[request.param]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": request.param == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print" if request.param == "paper" else "screen"})
    browser.get((report / "report.html").as_uri())
    assert browser.execute_script("return innerWidth") == width
    return browser


def test_the_page_draws_all_charts_without_an_error_or_a_request(page):
    names = page.execute_script("return [...document.querySelectorAll('figure')].map((f) => f.dataset.chart)")
    assert set(names) == ALWAYS | CLIP | VALID | PAIRS
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert page.get_log("browser") == []
    for chart in page.execute_script(LABELS):
        left, top, right, bottom = chart["picture"]
        assert right - left > 250
        assert bottom - top > 150
        assert any(path[2] - path[0] > 100 for path in chart["paths"])


def test_nothing_reaches_beyond_the_window(page):
    page.execute_script("for (const details of document.querySelectorAll('details')) details.open = true")
    assert page.execute_script(OUTSIDE) == []
    assert page.execute_script("return document.documentElement.scrollWidth") == page.execute_script(
        "return innerWidth"
    )


def test_no_label_is_cut_or_covers_another(page):
    for chart in page.execute_script(LABELS):
        left, top, right, bottom = chart["picture"]
        texts = chart["texts"]
        for number, (text, *box) in enumerate(texts):
            assert left <= box[0] < box[2] <= right, text
            assert top <= box[1] < box[3] <= bottom, text
            for other, *beside in texts[number + 1 :]:
                apart = box[2] <= beside[0] or beside[2] <= box[0] or box[3] <= beside[1] or beside[3] <= box[1]
                assert apart, (text, other)


def test_values_are_shown_under_the_pointer(page, runs):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    picture = page.find_element(By.CSS_SELECTOR, "figure[data-chart=lr] .picture")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", picture)
    ActionChains(page).move_to_element_with_offset(picture, 0, 0).perform()
    shown = picture.find_element(By.CSS_SELECTOR, ".tip").text.splitlines()
    values = {line.split(": ")[0]: line.split()[1] for line in shown}
    assert set(values) <= {"psft", "sft", "dpo"}
    for name, value in values.items():
        line = next(line for line in shown if line.startswith(name))
        step = int(line.split()[-1])
        rows = [json.loads(row) for row in (runs / name / "metrics.jsonl").read_text().splitlines()]
        (row,) = [row for row in rows if row["step"] == step]
        assert float(value) == pytest.approx(row["lr"], rel=1e-3)
    assert values


def test_differences_of_configurations_are_marked(page):
    rows = page.execute_script(CELLS, "#config tr.differs")
    differing = {name: cells for name, *cells in rows}
    assert differing["objective"] == ["psft", "sft", "dpo"]
    assert differing["train_iters"] == ["12", "10", "3"]
    assert not {"lr", "load_hf", "version of torch"} & set(differing)
    assert "differ in data, valid_data, objective" in page.find_element("css selector", ".warning").text


def test_the_most_clipped_tokens_are_listed(page, runs):
    written = json.loads((runs / "psft" / "clipped_tokens.json").read_text())
    rows = page.execute_script(CELLS, ".tokens tbody tr")
    assert [[row[0], row[2]] for row in rows] == [[repr(row["text"]), str(row["count"])] for row in written["tokens"]]
