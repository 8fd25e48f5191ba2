"""All commands of a page are found, and nothing else is mistaken for one."""

from __future__ import annotations

from pathlib import Path

import pages

_PAGE = """
Run `make x`, or `python a.py \\| cat`; `torchrun` and `mkdocs.yml` are no calls, `a b` neither.

```sh
A=1 python a.py --b \\
    'c d'   # it's a comment
# nothing but a comment

docker run x
```

1. In a list:

   ```sh
   #!/bin/bash
   sbatch "$x"
   ```

```python
open("photo.jpg")
```
"""


def test_commands(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(_PAGE)
    assert pages.commands(page) == [
        "A=1 python a.py --b 'c d'",
        "docker run x",
        '#!/bin/bash\nsbatch "$x"\n',
        "make x",
        "python a.py | cat",
    ]
    assert list(pages.strings(page)) == ["photo.jpg"]
    assert [language for language, _ in pages.fenced(page)] == ["sh", "sh", "python"]
