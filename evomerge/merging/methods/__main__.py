"""Print docs/methods.md from the declarations: python -m evomerge.merging.methods > docs/methods.md"""

import sys

from evomerge.merging.methods.declaration import markdown

sys.stdout.write(markdown())
