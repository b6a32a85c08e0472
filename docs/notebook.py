"""tutorial.md -> tutorial.ipynb, by jupytext: quotations stay text, what is to be tried becomes cells.

    python docs/notebook.py
"""
import re
from pathlib import Path

import jupytext

PAGE = Path(__file__).with_name("tutorial.md")
SETUP = '''```python
REPOSITORY = ""                     # on Colab: the address of the repository that this notebook comes from
import os
if REPOSITORY and not os.path.exists("repository"):
    !git clone -q {REPOSITORY} repository && pip install -q -e repository
os.chdir("repository" if REPOSITORY else ".." if os.path.exists("tutorial.md") else ".")
from IPython.display import Image, display
```

'''
SHOW = 'display(Image("try.png"))\n'
COMMAND = re.compile(r"^python .*?(?<!\\)\n", re.M | re.S)


def cell(match: re.Match) -> str:
    """A block of the page for jupytext: quotations are not evaluated, commands begin with !"""
    language, code = match.groups()
    if language == "python":
        return f"```python .noeval\n{code}```"
    if language == "bash":
        code = COMMAND.sub(lambda command: "!" + command[0] + SHOW * ("try.png" in command[0]), code)
    elif re.search(r"^show\(", code, re.M):
        code += SHOW
    return f"```python\n{code}```"


def notebook(page: str):
    """The page as a notebook; what recipes ask to change and to run is left to the reader."""
    text, heading, recipes = page.partition("\n## 14.")
    text = re.sub(r"^```(python|py|bash)\n(.*?)^```", cell, text, flags=re.M | re.S)
    recipes = re.sub(r"^```(python|bash)\n", r"```\1 .noeval\n", recipes, flags=re.M)
    title, rest = text.split("\n\n", 1)
    made = jupytext.reads(f"{title}\n\n{SETUP}{rest}{heading}{recipes}", fmt="md")
    made.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for number, made_cell in enumerate(made.cells):
        made_cell["id"] = f"cell-{number}"                  # the same in each run
    return made


if __name__ == "__main__":
    jupytext.write(notebook(PAGE.read_text(encoding="utf-8")), PAGE.with_suffix(".ipynb"))
