"""Write the pages, and parts of pages, that are made from the code: python -m tests.documents"""

from tests.documents.pages import GENERATED

if __name__ == "__main__":
    for path, describe in GENERATED.items():
        path.write_text(describe())
