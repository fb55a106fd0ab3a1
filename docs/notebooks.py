"""Run a notebook of the documentation, and make a page of it: `python docs/notebooks.py docs/first-steps.ipynb`.

The cells run in order, in one namespace, in the current folder. With `--write` the notebook keeps what they show; a
notebook is stored without execution counts and metadata, so that only content changes. MkDocs loads this file as a hook
and shows each notebook as a page.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """Run the code cells.

    Returns:
        The notebook with their outputs: text that is printed, the last expression as HTML, as an image or as text, and
        figures of matplotlib.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell = {**cell, "outputs": _outputs("".join(cell["source"]), cell["id"], namespace)}
        cells.append(cell)
    return {**notebook, "cells": cells}


def _outputs(source: str, name: str, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    outputs = []
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, name, "exec"), namespace)
        value = None
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if value is not None:
        outputs.append(_result("execute_result", _data(value)) | {"execution_count": None})
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
        for number in pyplot.get_fignums():
            figure = pyplot.figure(number)
            drawn = io.BytesIO()
            figure.savefig(drawn, format="png", dpi=72, metadata={"Software": None})
            pyplot.close(figure)
            data = {"image/png": base64.b64encode(drawn.getvalue()).decode(), "text/plain": [repr(figure)]}
            outputs.append(_result("display_data", data))
    return outputs


def _result(kind: str, data: dict[str, Any]) -> dict[str, Any]:
    return {"output_type": kind, "data": data, "metadata": {}}


def _data(value: Any) -> dict[str, Any]:
    data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
    if (html := getattr(value, "_repr_html_", None)) is not None:
        data["text/html"] = html().splitlines(keepends=True)
    elif (jpeg := getattr(value, "_repr_jpeg_", None)) is not None:  # of Pillow's images; a fifth of a PNG's bytes
        data["image/jpeg"] = base64.b64encode(jpeg()).decode()
    return data


def to_markdown(notebook: dict[str, Any]) -> str:
    """The cells and their outputs as a page."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "text/html" in data:
                # Markdown ends a block of HTML at an empty line
                parts.append(re.sub(r"\n\s*\n", "\n", "".join(data["text/html"])))
            elif images := [name for name in data if name.startswith("image/")]:
                parts.append(f'<img alt="what the cell shows" src="data:{images[0]};base64,{data[images[0]]}">')
            else:
                text = "".join(output.get("text") or data["text/plain"]).rstrip("\n")
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """MkDocs: add a page for each notebook."""
    from mkdocs.structure.files import File

    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            content = to_markdown(json.loads(file.content_string))
            files.append(File.generated(config, file.src_uri.removesuffix(".ipynb") + ".md", content=content))
    return files


def main() -> None:
    """Run a notebook."""
    parser = argparse.ArgumentParser(description="Run the code cells of a notebook in the current folder.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--write", action="store_true", help="Keep the outputs in the notebook.")
    arguments = parser.parse_args()
    done = run(json.loads(arguments.notebook.read_text(encoding="utf-8")))
    if arguments.write:
        arguments.notebook.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shown = [output for cell in done["cells"] for output in cell.get("outputs", ())]
    print(json.dumps(shown))


if __name__ == "__main__":
    main()
