"""Documents already in memory, as a source of batches (see mmdiff.data.sources.Source)."""

from collections.abc import Sequence

from mmdiff import Document, Text


class InMemory:
    def __init__(self, documents: Sequence[Document]):
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Document:
        return self.documents[index]

    def outline(self, index: int) -> list:
        return [s if isinstance(s, Text) else (s.height, s.width, s.learn) for s in self.documents[index].segments]

    def where(self, index: int) -> str:
        return f"document {index}"
