"""Corpora, tokenizers, packed rows and batches."""

from stackwise.data.batch import Batch
from stackwise.data.builder import pack_documents
from stackwise.data.corpus import builtin_documents
from stackwise.data.documents import DataError, Document
from stackwise.data.prepared import PreparedData, describe, load_prepared, prepare_data
from stackwise.data.rows import PackedRows
from stackwise.data.sampler import RowSampler, iterate_batches
from stackwise.data.tokenizer import Tokenizer, TokenizerInfo, load_tokenizer, train_bpe

__all__ = [
    "Batch",
    "DataError",
    "Document",
    "PackedRows",
    "PreparedData",
    "RowSampler",
    "Tokenizer",
    "TokenizerInfo",
    "builtin_documents",
    "describe",
    "iterate_batches",
    "load_prepared",
    "load_tokenizer",
    "pack_documents",
    "prepare_data",
    "train_bpe",
]
