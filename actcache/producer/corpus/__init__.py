"""Text as it is to documents, in order and in bounded memory: files here or at any fsspec URL, one source or several.

    corpus = open_corpus(["web.jsonl.zst:0.7", "hf://datasets/org/code/*.parquet:0.3"])

A document is a text, or the token ids of one that is tokenised already. Every error names the file, and the line or row;
nothing that cannot be read is passed over.
"""

from actcache.producer.corpus.documents import MAX_DOCUMENT_BYTES, Document, Fields
from actcache.producer.corpus.fields import choose_fields
from actcache.producer.corpus.files import CorpusFile
from actcache.producer.corpus.source import Corpus, Source, open_corpus, open_source

__all__ = [
    "MAX_DOCUMENT_BYTES",
    "Corpus",
    "CorpusFile",
    "Document",
    "Fields",
    "Source",
    "choose_fields",
    "open_corpus",
    "open_source",
]
