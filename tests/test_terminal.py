"""What a person sees in a terminal while a run goes on."""

import logging
import re
import warnings

import lightning
import pytest

from tests.command import ENVIRONMENT, python

termios = pytest.importorskip("termios", reason="needs pseudo-terminals, as POSIX has them")
BAR = re.compile(r"[\w -]+(, epoch \d/\d)?: +\d+%\|[^|]*\| \d+/\d+ \[\d\d:\d\d<.*")
RUN = ["fit", "--data.calibration_images=60", "--data.evaluation_images=40", "--data.batch_size=20"]
RUN += ["--ablation.methods=[zero,peak]", "--ablation.fractions=[0.5]", "--ablation.seeds=[1]"]
RUN += [
    "--trainer.callbacks=tests.test_terminal.Loud",
    "--ablation.sites=blocks.0.attn.proj",
    "--ablation.attribution.methods=[zero]",
    "--ablation.attribution.verify=2",
]
IN_A_TERMINAL = """
import fcntl, os, pty, struct, sys, termios
process, terminal = pty.fork()
if not process:
    fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 50, int(sys.argv[1]), 0, 0))
    os.execv(sys.executable, [sys.executable, "-m", "lightning_ablate", *sys.argv[2:]])
try:
    while written := os.read(terminal, 65536):
        os.write(1, written)
except OSError:  # how Linux says that the other end is closed
    pass
sys.exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


class Loud(lightning.Callback):
    """Warns and logs while the bars are up."""

    def on_train_batch_end(self, trainer, *_):
        warnings.warn(f"a warning in epoch {trainer.current_epoch}", stacklevel=1)

    def on_validation_batch_end(self, *_):
        logging.getLogger("lightning.pytorch").warning("a line of Lightning's")
        logging.getLogger("elsewhere").warning("a line of another library")


def shown(written, columns):
    """The lines of a terminal in which this was written, and every state of a line on the way."""
    lines, states, row, column = [""], [], 0, 0
    for part in re.findall(r"\x1b\[\d*[A-Za-z]|\r|\n|[^\x1b\r\n]", written):
        if part in "\r\n" or part.startswith("\x1b"):
            states.append(lines[row].rstrip())
        if part == "\r":
            column = 0
        elif part.startswith("\x1b"):
            assert part[-1] in "Am"  # up, and colours
            row -= part.endswith("A")
        else:
            if part == "\n" or column == columns:
                row, column = row + 1, 0 if part != "\n" else column
                lines += [""] * (row == len(lines))
            if part != "\n":
                lines[row] = f"{lines[row]:{column}}"[:column] + part + lines[row][column + 1 :]
                column += 1
    return [line.rstrip() for line in lines], states


def test_in_80_columns_no_line_is_torn_and_bars_say_what_they_count(tmp_path):
    check(80, tmp_path)


def test_in_120_columns_too(full, tmp_path):
    check(120, tmp_path)


def check(columns, folder):
    environment = {**ENVIRONMENT, "TERM": "xterm", "COLUMNS": ""}
    run = python("-c", IN_A_TERMINAL, columns, *RUN, cwd=folder, env=environment, text=False)
    assert run.returncode == 0, run.stdout.decode()
    lines, states = shown(run.stdout.decode(), columns)
    left = [line for line in lines if "%|" in line]
    assert [line.split(":")[0] for line in left] == ["Verification, epoch 4/4", "Sweep"]
    assert all(BAR.fullmatch(line) for line in {*left, *(state for state in states if "%|" in state)})
    assert " 15/15 [" in left[0] and " 6/6 [" in left[1]  # 3 batches of 5 conditions, 2 of 3
    assert any(re.fullmatch(r"plan: 3 conditions, .* \(h:mm:ss\)", line) for line in lines)
    assert "`Trainer.fit` stopped: `max_epochs=4` reached." in lines
    said = "\n".join(lines)
    assert said.count(": UserWarning: a warning in epoch") == 4
    assert lines.count("a line of Lightning's") == lines.count("a line of another library") == 2
    assert not any("v_num" in state for state in states) and left[1].endswith("passes/s]")
    assert not any("FLOPs" in line or "Trainable" in line for line in lines)
