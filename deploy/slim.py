"""Take out of an environment what a server never opens: python deploy/slim.py /opt/celestial. Used by the Dockerfile.

A path that is no longer there is an error: then a library has changed, and this list has to follow.
"""

import shutil
import struct
import subprocess
import sys
from pathlib import Path

NEVER_OPENED = (
    "gradio/media_assets",  # examples
    "gradio/templates/node",  # rendering on the server, which needs Node
    "gradio/templates/frontend/static/bokeh",
    "gradio/templates/frontend/static/ffmpeg",  # cuts videos in the browser: 32 MB
    "gradio/templates/frontend/assets/AltairPlot-*",
    "gradio/templates/frontend/assets/PlotlyPlot-*",
    "PIL/_avif.*",  # of the pictures that are taken none is AVIF
    "pillow.libs/libavif-*",
    "hf_xet",  # downloads from a hub
    "hf_xet-*.dist-info",
    "numpy/f2py",
    "onnxruntime/capi/libonnxruntime.so.*",  # for C; Python's module brings its own
    "onnxruntime/datasets",
    "onnxruntime/quantization",
    "onnxruntime/tools",
    "onnxruntime/transformers",
    "sqlalchemy/dialects/mssql",
    "sqlalchemy/dialects/mysql",
    "sqlalchemy/dialects/oracle",
    "sqlalchemy/testing",
)
FOR_BUILDING = {".a", ".c", ".h", ".hpp", ".map", ".pxd", ".pyi", ".pyx"}
NOT_COMPILED = r"/pygments/(lexers|styles)/|/huggingface_hub/cli/|/numpy/(distutils|polynomial)/"


def drop_symbols(library: Path) -> None:
    "Cut off what stands behind the last segment of an ELF file (64 bit): section headers, symbols and debugging information."
    content = bytearray(library.read_bytes())
    if content[:6] != b"\x7fELF\x02\x01":
        return
    start, size, count = struct.unpack_from("<Q", content, 32)[0], *struct.unpack_from("<HH", content, 54)
    headers = [struct.unpack_from("<IIQQQQQQ", content, start + i * size) for i in range(count)]
    end = max(header[2] + header[5] for header in headers)  # where a segment begins, and its size in the file
    struct.pack_into("<Q", content, 40, 0)  # no section headers,
    struct.pack_into("<HH", content, 60, 0, 0)  # none of them, and no names
    library.write_bytes(content[:end])


def main(environment: Path) -> None:
    site = next(environment.glob("lib/python3*/site-packages"))
    for pattern in NEVER_OPENED:
        if not (paths := list(site.glob(pattern))):
            sys.exit(f"{site}/{pattern} is not there: mend deploy/slim.py")
        for path in paths:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in [path for path in site.rglob("*") if path.is_dir() and path.name in ("tests", "test_data")]:
        shutil.rmtree(path, ignore_errors=True)  # one may stand within another
    for path in site.rglob("*"):
        if path.suffix in FOR_BUILDING:
            path.unlink()
        elif ".so" in path.suffixes and path.is_file() and not path.is_symlink():
            drop_symbols(path)
    # Not by their times: all files of a reproducible image have the same.
    options = ("-q", "--invalidation-mode", "unchecked-hash", "-x", NOT_COMPILED)
    subprocess.run([environment / "bin/python", "-m", "compileall", *options, site], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
