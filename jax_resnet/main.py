"""Train or evaluate: `python -m jax_resnet.main --config configs/resnet20_digits.py`.

--config.KEY=VALUE changes a value of the config; jax_resnet/config/defaults.py has them all.
"""

import gc
import re
import signal
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from jax_resnet.commands.ending import hush, lacking, leave, print_plainly
from jax_resnet.commands.status import fail
from jax_resnet.config import parse_flags, validate
from jax_resnet.errors import Interrupted, UserError

config_flags.DEFINE_config_file("config", None, "The config file, with `:argument` where it takes one.")
flags.DEFINE_string("workdir", None, "Where the run is kept. Default: runs/CONFIG/DATA-seedN.")
flags.DEFINE_enum("mode", "train", ["train", "eval"], "eval: evaluate a checkpoint of the workdir.")
flags.DEFINE_string("checkpoint", "best", "With --mode=eval: best, latest, a step, or init (of init_from).")
FLAGS = flags.FLAGS


def run() -> None:
    """Train or evaluate as the flags say. Raises UserError for a user's mistake."""
    if FLAGS.config is None and not (FLAGS.mode == "eval" and FLAGS.workdir):
        raise UserError("--config is missing: give a file, for example --config configs/resnet20_digits.py")
    if FLAGS.config is not None:
        validate(FLAGS.config)
    workdir = FLAGS.workdir or default_workdir()
    # This import loads JAX, for which a mistyped flag should not wait.
    from jax_resnet.runtime.distributed import join_job

    join_job()
    if FLAGS.mode == "eval":
        from jax_resnet.training.evaluate import evaluate_checkpoint

        evaluate_checkpoint(workdir, config=FLAGS.config, which=FLAGS.checkpoint)
    else:
        from jax_resnet.commands.host import command_host
        from jax_resnet.training.loop import train

        with command_host() as host:
            train(FLAGS.config, workdir, host=host)


def default_workdir() -> Path:
    """Make runs/CONFIG/DATA-seedN, the same for the same command."""
    file, _, argument = config_flags.get_config_filename(FLAGS["config"]).partition(":")
    kind, colon, path = FLAGS.config.data.name.partition(":")
    data = FLAGS.config.data.name
    if colon and kind in ("npz", "folder", "prepared"):
        data = Path(path).expanduser().resolve().stem
    config = _file_name(f"{Path(file).stem}-{argument}")
    return Path("runs") / config / f"{_file_name(data)}-seed{FLAGS.config.seed}"


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.]+", "_", text).strip("._")


def main(_: list[str]) -> int:
    """Run the command; return 2 after one line for a user's mistake, 128 + the signal's number."""
    hush()
    print_plainly()
    try:
        run()
    except Interrupted as e:
        print(e, file=sys.stderr)
        return leave(128 + e.signum)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return leave(128 + signal.SIGINT)
    except UserError as e:
        return leave(fail(e))
    except Exception as e:
        return leave(fail(lacking(e)))
    return leave(0)


def _parse(argv: list[str]) -> list[str]:
    # Libraries log while the flags are parsed.
    logging.set_verbosity(logging.ERROR)
    # With Python's threshold of 700, garbage collection takes a tenth of JAX's tracing at start.
    gc.set_threshold(100_000)
    try:
        return parse_flags(argv)
    except UserError as e:
        sys.exit(fail(e))


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
