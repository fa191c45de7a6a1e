"""The one preprocessing that stands in two rooms: the line's and the training room's are the same."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def resize_of(path):
    """Give the function's arguments and its body without the docstring, as the parser sees them."""
    tree = ast.parse((ROOT / path).read_text())
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "to_model_size"]
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return [argument.arg for argument in function.args.args], [ast.unparse(statement) for statement in body]


def test_the_line_resizes_as_the_model_was_trained():
    """`to_model_size` has the same arguments and the same body in both rooms, which cannot import each other."""
    line, training = resize_of("pipeline/ingest.py"), resize_of("training/data.py")
    assert line == training
    assert any("cv2.INTER_AREA" in statement for statement in line[1])
