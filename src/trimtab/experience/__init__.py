"""Experience: the transitions of training runs, kept as files, so that agents learn from every earlier run.

Arrays only: a spec is a mapping of JSON with a fingerprint here, and nothing else of it is known. Importing this, and
listing what there is, needs no NumPy.
"""

from trimtab.experience.files import Header, read_file, read_header
from trimtab.experience.store import DEFAULT_FOLDER, ExperienceStore, Summary
from trimtab.experience.transitions import Transitions

__all__ = ["DEFAULT_FOLDER", "ExperienceStore", "Header", "Summary", "Transitions", "read_file", "read_header"]
