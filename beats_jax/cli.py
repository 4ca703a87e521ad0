"""The command line: `beats-jax COMMAND`, the same as `python -m beats_jax.cli COMMAND`.

A command is one function: its docstring is the help, it declares its arguments on the parser, and
what it returns runs them. Everything heavy is imported when a command runs, so `--help` is quick.

Exit codes: 0 all done; 2 wrong usage or input, with one line that says so; 3 done, but some files
were skipped; 130 interrupted.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

Run = Callable[[argparse.Namespace], int]

# What `tokenize --agreement` compares with: iteration 1's tokens of `configs/local_esc50.py`.
RANDOM_PROJECTION = dict(
    mode="bestrq", codebook_size=1024, dim=16, pool=4, loudness_weight=0.1, seed=0
)


def prepare(parser: argparse.ArgumentParser) -> Run:
    """Decode a folder of audio once, to 16 kHz shards that training reads.

    SOURCE is a folder (its sub-folders are the classes), a folder with metadata.csv; ESC-50,
    AudioSet (its segment lists and clips named by YTID), Speech Commands or IEMOCAP as they come; a
    manifest (.csv or .jsonl with a column `filename`), or the word `synthetic`. Broken and too
    short files are skipped and listed in OUT/report.json. A second call reuses the first's OUT.

    --beam decodes and writes on the workers of Apache Beam, and goes on where it was killed. All of
    them see SOURCE and OUT under the same paths, and have this package. Without --beam-options:
    --jobs processes on this machine.

    example:
      beats-jax prepare ~/ESC-50-master esc10 --filter esc10=True
      beats-jax prepare /mnt/audioset /mnt/prepared --beam \\
          --beam-options='--runner=FlinkRunner --flink_master=flink:8081 --parallelism=400'
    """
    parser.add_argument("source", metavar="SOURCE", help="folder, manifest, or 'synthetic'")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument(
        "--filter", default="", help="rows to take: 'COLUMN=VALUE|VALUE,COLUMN!=VALUE'"
    )
    parser.add_argument("--jobs", type=int, help="processes that decode (default: one a CPU)")
    parser.add_argument("--beam", action="store_true", help="on Apache Beam; see above")
    parser.add_argument("--beam-options", metavar="OPTIONS", default="", help="Beam's, in quotes")

    def run(args: argparse.Namespace) -> int:
        from beats_jax.data.prepare import prepare

        options = shlex.split(args.beam_options)
        if options and not args.beam:
            raise ValueError(f"--beam-options={args.beam_options!r} without --beam; give both")
        beam = options if args.beam else None
        report = prepare(args.source, args.out, jobs=args.jobs, filter=args.filter, beam=beam)
        for note in report.notes:
            print(note)
        print(
            f"{args.out}: {report.clips} of {report.listed} clips, {report.hours:.2f} h;"
            f" {len(report.padded)} padded to one token column; skipped: {len(report.too_short)}"
            f" too short, {len(report.unreadable)} unreadable"
            + (f" (listed in {os.path.join(args.out, 'report.json')})" if report.skipped else "")
        )
        return 3 if report.skipped else 0

    return run


def stats(parser: argparse.ArgumentParser) -> Run:
    """Mean and standard deviation of a prepared data set's log-mel, for config.data.mean and std.

    example:
      beats-jax stats esc10 --filter 'fold!=5'
    """
    parser.add_argument("data", metavar="DATA", nargs="+", help="folders made by `prepare`")
    parser.add_argument("--filter", default="", help="clips to take, as for `prepare`")

    def run(args: argparse.Namespace) -> int:
        from beats_jax.data.prepare import dataset_stats
        from beats_jax.data.sources import join, open_clips

        clips = join({path: open_clips(path) for path in args.data}).select(args.filter)
        mean, std, frames = dataset_stats(clips)
        print(f"{len(clips)} clips, {frames} frames")
        print(f"--config.data.mean={mean:.5f} --config.data.std={std:.5f}")
        return 0

    return run


def probe(parser: argparse.ArgumentParser) -> Run:
    """Probe a trained encoder, beside the same encoder untrained and a log-mel baseline.

    Fitted to each clip's mean feature on all folds but one, and scored on that one: logistic
    regression (linear), cosine neighbours (knn) or the nearest class mean (mean); a learned query
    over the clip's tokens (attention). C and k are chosen on the training folds alone. With
    --sweep-layers: every layer of the trained encoder, in one pass over the audio.

    example:
      beats-jax probe runs/esc50/iter1/pretrain esc50_prepared --filter esc10=True
      beats-jax probe BEATs_iter3.pt esc50_prepared --probe linear,knn --sweep-layers layers.png
    """
    parser.add_argument("ckpt", metavar="STAGE", help="W/<iteration>/<stage>, …@STEP, or a model")
    parser.add_argument("data", metavar="DATA", help="a folder made by `prepare`")
    parser.add_argument("--filter", default="", help="clips to take, as for `prepare`")
    parser.add_argument("--label", default="category", help="column of the class (category)")
    parser.add_argument("--fold", default="fold", help="column of the fold (fold)")
    parser.add_argument(
        "--probe", default="linear", help="linear, knn, mean, attention; several with commas"
    )
    layer = parser.add_mutually_exclusive_group()
    layer.add_argument("--layer", type=int, help="0 = input of the first block … N = last (last)")
    layer.add_argument(
        "--sweep-layers", metavar="PNG", help="all layers: a table, and this picture"
    )
    parser.add_argument("--cache", metavar="FOLDER", help="keep mean features for the next call")

    def run(args: argparse.Namespace) -> int:
        from beats_jax import probe

        kinds = [kind.strip() for kind in args.probe.split(",")]
        options: dict[str, Any] = dict(
            kinds=kinds, filter=args.filter, label=args.label, fold=args.fold, cache=args.cache
        )
        if args.sweep_layers:
            from beats_jax.score_plots import plot_layers

            rows, baseline = probe.sweep_layers(args.ckpt, args.data, **options)
            means = {kind: [row.mean for row in layers] for kind, layers in rows.items()}
            stds = {kind: [row.std for row in layers] for kind, layers in rows.items()}
            level = {kind: row.mean for kind, row in baseline.items()}
            plot_layers(means, stds, level, args.sweep_layers)
            print(probe.sweep_table(rows, baseline))
            return 0
        for kind, rows in probe.probe_stage(
            args.ckpt, args.data, layer=args.layer, **options
        ).items():
            if len(kinds) > 1:
                print(f"\n{kind}:\n")
            print(probe.probe_table(rows, kind))
        return 0

    return run


def evaluate(parser: argparse.ArgumentParser) -> Run:
    """Score a labelled data set with fine-tuned models, and with their ensemble.

    Writes OUT/results.json, OUT/RESULTS.md (what was scored, by what, and how well: the mean of the
    models, the best one, and the ensemble by the mean of their probabilities) and pictures. Scores
    are kept in OUT/scores and used again for the same model and data. DATA is a folder made by
    `prepare`, or what `prepare` takes, which is then prepared into OUT. --compare sets two results
    side by side, and refuses those over unlike sets.

    example:
      beats-jax evaluate --ckpt W1/finetune W2/finetune W3/finetune esc10 --filter fold=5 --out E
      beats-jax evaluate --compare E other/results.json
    """
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--ckpt", metavar="MODEL", nargs="+", help="fine-tuned models, then DATA")
    job.add_argument("--compare", metavar="OUT", nargs=2, help="folders of two evaluations")
    parser.add_argument("data", metavar="DATA", nargs="?", help="data set (or --ckpt's last word)")
    parser.add_argument("--out", metavar="OUT", default="evaluation", help="folder (evaluation)")
    parser.add_argument("--filter", default="", help="clips to take, as for `prepare`")
    parser.add_argument("--label", default="", help="column of the class (category or labels)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows at a time (8)")
    parser.add_argument("--precision", default="auto", help="float32, bfloat16 or auto (auto)")

    def run(args: argparse.Namespace) -> int:
        from beats_jax import results

        if args.compare:
            print(results.compare(*args.compare))
            return 0
        from beats_jax.evaluate import evaluate

        *models, data = [*args.ckpt, *filter(None, [args.data])]
        if not models:
            raise ValueError(f"--ckpt {data}: and the data? give --ckpt MODEL [MODEL …] DATA")
        options = {name: getattr(args, name) for name in ("filter", "label", "batch_size")}
        found = evaluate(models, data, args.out, precision=args.precision, **options)
        for note in found["data"]["notes"]:
            print(f"note: {note}", file=sys.stderr)
        print(results.results_table(found))
        print(f"\n{args.out}: {results.RESULTS}, {results.REPORT}, scores and plots")
        return 0

    return run


def convert(parser: argparse.ArgumentParser) -> Run:
    """Write a model for its users: as a folder without pickle, or for the official PyTorch code.

    SRC is a stage folder (W/<iteration>/<stage>, …@STEP), an exported folder or an official .pt
    file. DST that ends in .pt becomes an official file, any other an exported folder. What DST
    cannot hold (a label predictor, say) is left out and listed. With --verify both are run on a
    stored input and the largest error of each layer goes into a certificate, parity.json; a DST
    that is there already is then only checked.

    example:
      beats-jax convert W/iter2/pretrain my_beats --verify
      beats-jax convert my_beats my_beats.pt --verify
    """
    parser.add_argument("src", metavar="SRC", help="stage folder, exported folder or official .pt")
    parser.add_argument("dst", metavar="DST", help="folder, or file ….pt, to write")
    parser.add_argument("--verify", action="store_true", help="compare SRC and DST, layer by layer")

    def run(args: argparse.Namespace) -> int:
        from beats_jax import exported, parity
        from beats_jax.convert import to_official
        from beats_jax.pretrained import lineage_lines, load_model
        from beats_jax.torch_file import write_torch_file

        source, there, lines = load_model(args.src), os.path.exists(args.dst), []
        print(f"{args.src}: {exported.describe(source)}")
        official = args.dst.endswith(".pt")
        if official and there and not args.verify:
            raise ValueError(f"{args.dst} is there already; give another name")
        if official and not there:
            checkpoint, lines = to_official(source)
            write_torch_file(args.dst, checkpoint)
        elif not (there and args.verify):
            lines = exported.save_exported(source, args.dst, lineage_lines(source.source))
        for line in lines:
            print(f"left out: {line}")
        written = load_model(args.dst)
        print(f"{args.dst}: {exported.describe(written)}")
        if args.verify:
            certificate = parity.certify(source, written)
            where = parity.write_certificate(certificate, args.dst)
            worst = max(certificate["max_error"].values())
            print(f"{where}: largest error {worst:g}, allowed {certificate['tolerance']:g}")
        return 0

    return run


def embed(parser: argparse.ArgumentParser) -> Run:
    """Features of audio files: one vector a file, or with --pool none every 0.16 s and band.

    INPUT is a file, a folder, a manifest (.csv, .jsonl with a column `filename`) or a quoted glob.
    OUT is a table, X.npz (`files`, `embeddings`), X.jsonl or X.csv, or the name of a folder: a .npz
    a file. Recordings of any length are taken in overlapping windows. Interrupted, the same command
    goes on; files that cannot be used are skipped and listed (exit code 3).

    example:
      beats-jax embed BEATs_iter3.pt recordings --out embeddings.npz
    """
    _add_inputs(parser, "a stage folder, an exported folder or an official .pt file")
    parser.add_argument("--out", metavar="OUT", required=True, help="table or folder to write")
    parser.add_argument("--layer", type=int, help="0 = input of the first block … N = last (last)")
    parser.add_argument(
        *("--pool",),
        choices=("mean", "none"),
        default="mean",
        help="mean: one vector a file; none: features [T', 8, D] and times, into a folder (mean)",
    )

    def run(args: argparse.Namespace) -> int:
        if args.pool == "none" and os.path.splitext(args.out)[1] in (".npz", ".jsonl", ".csv"):
            raise ValueError(f"--pool none writes a file for each input; {args.out} is no folder")
        from beats_jax import questions

        model, files = _opened(args)
        model.check_layer(args.layer)
        question = questions.embedding if args.pool == "mean" else questions.frames
        return _answer(args, model, question(model, args.layer), files)[0]

    return run


def classify(parser: argparse.ArgumentParser) -> Run:
    """What sounds are in audio files, by a fine-tuned model: class names with probabilities.

    INPUT as for `embed`. Without --out the likeliest classes are printed; X.csv has every class,
    X.jsonl the likeliest, both of the whole file and of its windows of 10 s; X.npz all as arrays.

    example:
      beats-jax classify BEATs_iter3_plus_AS2M_finetuned.pt street.wav --top 3
    """
    _add_inputs(parser, "a fine-tuned model: stage folder, exported folder or official .pt file")
    parser.add_argument("--out", metavar="OUT", help="table to write (print)")
    parser.add_argument("--top", type=int, default=5, help="classes to print and for .jsonl (5)")

    def run(args: argparse.Namespace) -> int:
        if args.top < 1:
            raise ValueError(f"--top is {args.top}; want at least 1")
        from beats_jax import questions

        model, files = _opened(args)
        question = questions.classes(model, args.top)
        code, results = _answer(args, model, question, files)
        for file, result in results.items():
            print(file)
            for entry in question.line(result)["top"]:
                print(f"  {entry['prob']:.3f}  {entry['label']}")
        return code

    return run


def tokenize(parser: argparse.ArgumentParser) -> Run:
    """Acoustic tokens of audio files, or of a prepared data set for training.

    --out writes the tokens of files as `embed` does its features: int32 [T', 8] a file, a row every
    0.16 s, the bands from low to high. The other two take folders made by `prepare`: --store writes
    the ids of every window once, so that pre-training need not tokenize in its step
    (--config.data.crop=grid --config.data.token_ids=OUT); --agreement adds white noise and counts
    the tokens that stay, for this tokenizer and for a random projection. Interrupted, the same
    command goes on.

    example:
      beats-jax tokenize Tokenizer_iter3.pt recordings --out tokens.jsonl
      beats-jax tokenize W/iter2/tokenizer prepared --store prepared/tokens --seconds 10
    """
    _add_inputs(parser, "a tokenizer: W/iter2/tokenizer, …@STEP, exported folder or official .pt")
    job = parser.add_mutually_exclusive_group(required=True)
    job.add_argument("--out", metavar="OUT", help="table or folder for the tokens of files")
    job.add_argument("--store", metavar="OUT", help="folder for the ids of a prepared data set")
    job.add_argument("--agreement", metavar="PNG", help="picture to draw, of a prepared data set")
    prepared = parser.add_argument_group("of a prepared data set")
    prepared.add_argument("--seconds", type=float, default=10.0, help="length of a window (10)")
    prepared.add_argument("--filter", default="", help="clips to take, for --agreement")
    for name in ("mean", "std"):
        help = f"log-mel's {name} of the run that reads them (the tokenizer's own)"
        prepared.add_argument(f"--{name}", type=float, help=help)

    def run(args: argparse.Namespace) -> int:
        if args.out:
            from beats_jax import questions

            model, files = _opened(args)
            return _answer(args, model, questions.tokens(model), files)[0]
        from beats_jax import tokens
        from beats_jax.data.dataset import open_folders

        clips = open_folders(",".join(args.inputs))
        tokenizer = tokens.load_tokenizer(args.model)
        options = dict(clip_seconds=args.seconds, batch_size=args.batch_size)
        if args.store:
            equal = tokens.store_tokens(
                tokenizer,
                clips,
                args.store,
                precision=args.precision,
                mean=args.mean,
                std=args.std,
                **options,
            )
            print(f"{args.store}: {100 * equal:.2f} % of a batch's ids are those of float32")
            return 0
        from beats_jax import plots

        snrs = (40, 30, 20, 10, 0)
        agreement = tokens.token_agreement(
            tokenizer, RANDOM_PROJECTION, clips.select(args.filter), snrs, **options
        )
        plots.plot_token_agreement(snrs, agreement, args.agreement)
        print("| tokens | " + " | ".join(f"{s} dB" for s in snrs) + " | chance | perplexity |")
        print("|---|" + "---|" * (len(snrs) + 2))
        for name, row in agreement.items():
            shares = " | ".join(f"{share:.3f}" for share in row["agreement"])
            print(f"| {name} | {shares} | {row['chance']:.4f} | {row['perplexity']:.0f} |")
        return 0

    return run


def _add_inputs(parser: argparse.ArgumentParser, model: str) -> None:
    parser.add_argument("model", metavar="MODEL", help=model)
    parser.add_argument(
        "inputs", metavar="INPUT", nargs="+", help="files, folders, globs, manifest"
    )
    for name, columns in (("window", 62), ("hop", 31)):
        help = f"of long recordings, in columns of 0.16 s ({columns})"
        parser.add_argument(f"--{name}", type=int, default=columns, help=help)
    help = "windows at a time (4; more on an accelerator)"
    parser.add_argument("--batch-size", type=int, default=4, help=help)
    parser.add_argument("--precision", default="auto", help="float32, bfloat16 or auto (auto)")


def _opened(args: argparse.Namespace) -> tuple[Any, list[str]]:
    from beats_jax import corpus
    from beats_jax.inference import load

    files = corpus.find(args.inputs)
    if args.batch_size < 1:
        raise ValueError(f"--batch-size is {args.batch_size}; want at least 1")
    return load(args.model, precision=args.precision), files


def _answer(
    args: argparse.Namespace, model: Any, question: Any, files: list[str]
) -> tuple[int, dict[str, Any]]:
    """Asks every file and says what was skipped; the exit code, and the results without --out."""
    from beats_jax import corpus

    options = {name: getattr(args, name) for name in ("window", "hop", "batch_size")}
    settings = {"precision": args.precision}
    outcome = corpus.ask(model, question, files, args.out, **options, settings=settings)
    for file, why in outcome.skipped.items():
        print(f"skipped: {why if file in why else f'{file}: {why}'}", file=sys.stderr)
    if not outcome.done:
        raise ValueError(f"none of the {len(files)} files could be used")
    if args.out:
        print(f"{args.out}: {outcome.done} of {len(files)} files")
    return (3 if outcome.skipped else 0), {} if args.out else outcome.results


def export(parser: argparse.ArgumentParser) -> Run:
    """A model as one StableHLO program: waveforms of one length in, batches of any size.

    Front end and weights are inside; `jax.export.deserialize` runs it where none of this package
    is installed. OUT.json says what it takes and gives. The program is run and held against the
    model before the command ends.

    example:
      beats-jax export BEATs_iter3.pt beats.stablehlo --seconds 10 --platforms cpu,cuda
    """
    parser.add_argument("model", metavar="MODEL", help="stage folder, exported folder or .pt file")
    parser.add_argument("path", metavar="OUT", help="file to write")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the clips (10)")
    parser.add_argument(
        *("--output",),
        choices=("features", "logits", "ids"),
        help="(logits of a fine-tuned model, ids of a tokenizer, else features)",
    )
    parser.add_argument("--platforms", default="cpu,cuda,tpu", help="for which (cpu,cuda,tpu)")

    def run(args: argparse.Namespace) -> int:
        from beats_jax import stablehlo
        from beats_jax.inference import load

        model = load(args.model)
        output = args.output or {"finetuned": "logits", "tokenizer": "ids"}.get(model.kind)
        exported = stablehlo.export(
            model, args.seconds, output or "features", args.platforms.split(",")
        )
        stablehlo.save(exported, args.path, model)
        error = stablehlo.check(args.path, model)
        size = os.path.getsize(args.path) / 1e6
        print(f"{args.path}: {exported.fun_name}, {size:.1f} MB, largest error {error:.2g}")
        return 0

    return run


def info(parser: argparse.ArgumentParser) -> Run:
    """What a model is, and what it was made with: its family tree.

    example:
      beats-jax info runs/smoke/iter2/pretrain
    """
    parser.add_argument("path", metavar="PATH", help="stage folder, exported folder or .pt file")
    parser.add_argument("--json", action="store_true", help="print JSON")

    def run(args: argparse.Namespace) -> int:
        import json

        from beats_jax.exported import count_parameters, describe
        from beats_jax.pretrained import lineage_lines, load_model

        model = load_model(args.path)
        if args.json:
            print(json.dumps({**model.source, "parameters": count_parameters(model)}, indent=1))
            return 0
        net, classes, codes = model.model, len(model.labels), model.num_codes
        print(describe(model))
        print(
            f"{net.num_layers} layers, width {net.embed_dim}, {net.num_heads} heads; "
            f"log-mel mean {model.mean:.5f}, std {model.std:.5f}"
            + (f"; {classes} classes ({model.task})" if classes else "")
            + (f"; {codes} tokens" if codes else "")
        )
        print("\n".join(lineage_lines(model.source)))
        return 0

    return run


def benchmark(parser: argparse.ArgumentParser) -> Run:
    """How fast this machine encodes, trains, reads and compiles: a table, and JSON.

    Needs no data: random weights, noise. Rows of a run are timed in turn, beside a matrix product
    of the same dtype, the ceiling; times are medians (least to most). `taskset -c 0 beats-jax …`
    measures one core. --against runs an installed PyTorch implementation with the same weights and
    input, checks that the outputs agree, and gives the ratio.

    what:
      fbank, encode, tokenize      waveforms to log-mel, features, tokens
      pretrain, distill, finetune  one training step, as the loop compiles it
      masking                      pre-training's encoder and step, on its share of the patches and
                                   on all
      attention                    a layer's, in one piece, in parts, by GPU kernels
      pipeline                     prepared shards to batches
      compile, checkpoint          the pre-training step's start-up; its state to disk and back
      scaling                      what that step sends between devices, and how well it should
                                   scale: computed for --size and --devices, no machine needed

    example:
      beats-jax benchmark --what encode --size base --batch-size 8
      beats-jax benchmark --what encode --batch-size 1 --against avex --json encode.json
    """
    parser.add_argument("--what", default="encode", help="see above (encode)")
    parser.add_argument("--size", default="base", help="tiny, small, base or large (base)")
    parser.add_argument("--batch-size", type=int, default=8, help="clips in the whole batch (8)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a clip (10)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or auto (auto)")
    parser.add_argument("--mesh", default="data=-1", help="axes, as data=4,fsdp=2 (data=-1: all)")
    parser.add_argument("--repeats", type=int, help="calls of each row (10; 3 for compile)")
    parser.add_argument("--tokens", default="random", help="pretrain's: random, distilled, stored")
    help = "of the pipeline: tf, log-mel on the host; numpy, in the step (tf)"
    parser.add_argument("--backend", choices=("tf", "numpy"), default="tf", help=help)
    help = "avex, speechbrain, or a folder with the official code"
    parser.add_argument("--against", metavar="PEER", default="", help=help)
    help = "of scaling: how many, with commas (8,64,256); --size takes several too"
    parser.add_argument("--devices", metavar="N", default="8,64,256", help=help)
    parser.add_argument("--json", metavar="OUT", help="file to write")
    parser.add_argument("--profile", metavar="FOLDER", default="", help="write a trace there")

    def run(args: argparse.Namespace) -> int:
        if args.repeats is not None and args.repeats < 1:
            raise ValueError(f"--repeats is {args.repeats}; want at least 1")
        if args.what == "scaling":
            return _scaling(args)
        mesh = {"data": 1 if "data=" in args.mesh else -1, "fsdp": 1, "tensor": 1}
        for part in args.mesh.split(","):
            axis, _, size = part.partition("=")
            if axis not in mesh or not size.lstrip("-").isdigit():
                raise ValueError(f"--mesh {args.mesh}: want sizes of data, fsdp, tensor: data=4")
            mesh[axis] = int(size)
        from beats_jax import benchmark

        names = ("what", "size", "batch_size", "seconds", "dtype", "tokens", "backend")
        settings = benchmark.Settings(**{name: getattr(args, name) for name in names}, mesh=mesh)
        report = benchmark.run(settings, args.repeats, args.against, args.profile)
        if args.json:
            benchmark.save(report, args.json)
        print(benchmark.table(report))
        return 0

    return run


def _scaling(args: argparse.Namespace) -> int:
    counts = args.devices.split(",")
    if not all(count.isdigit() for count in counts):
        raise ValueError(f"--devices {args.devices}: want numbers, as in --devices 8,64")
    from beats_jax import benchmark, scaling

    report = scaling.report(args.size.split(","), [*map(int, counts)], args.seconds, args.dtype)
    if args.json:
        benchmark.save(report, args.json)
    print(scaling.table(report))
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _call(args: argparse.Namespace) -> int:
    from absl import logging

    logging.set_verbosity(logging.ERROR)  # Orbax warns of what does not concern a reader
    return args.run(args)


COMMANDS = (
    *(prepare, stats, embed, classify, tokenize, probe, evaluate),
    *(convert, export, info, benchmark),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code."""
    if sys.stdin is None:  # closed: a pipe would get its number, and workers close theirs
        os.open(os.devnull, os.O_RDONLY)
    parser = _Parser(prog="beats-jax", description="BEATs audio pre-training in JAX.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        first, _, rest = (command.__doc__ or "").partition("\n")
        subparser = commands.add_parser(
            command.__name__,
            help=first,
            description=f"{first}\n{rest}".replace("\n    ", "\n"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        subparser.set_defaults(run=command(subparser), prog=subparser.prog)
    args = parser.parse_args(argv)
    try:
        return _call(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"{args.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{args.prog}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
