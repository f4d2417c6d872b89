"""From what is said about a corpus to what it is read as."""

from typing import Any

from actcache.errors import UsageError
from actcache.producer.corpus.chat import find_template, make_renderer
from actcache.producer.corpus.documents import Fields
from actcache.producer.corpus.ids import TOKEN_DTYPES


def choose_fields(
    tokenizer: Any,
    n_ids: int,
    *,
    text_column: str | None = None,
    ids_column: str | None = None,
    chat_template: str | None = None,
    token_dtype: str = "uint16",
    document_tokens: int | None = None,
) -> Fields:
    """What a corpus is read as.

    Args:
        tokenizer: the model's.
        n_ids: ids the model knows.
        text_column: the field that holds the text, or with a chat template the messages; "text" and "messages" where left
            out.
        ids_column: the field that holds token ids, of a corpus that is tokenised already.
        chat_template: makes text of messages; see `find_template`.
        token_dtype: of .bin files.
        document_tokens: ids of a document in .bin and one-dimensional .npy files; None: documents end at the EOS.

    Raises:
        UsageError: two of them do not go together, or one cannot be. NotFoundError: no such template file.
    """
    if ids_column is not None and (text_column is not None or chat_template is not None):
        raise UsageError(
            "--ids-column reads ids that are tokens already; leave out --text-column and --chat-template"
        )
    if token_dtype not in TOKEN_DTYPES:
        raise UsageError(f"--token-dtype {token_dtype}: expected one of {', '.join(TOKEN_DTYPES)}")
    if document_tokens is not None and document_tokens < 1:
        raise UsageError(f"--document-tokens {document_tokens}: expected at least 1")
    template = None if chat_template is None else find_template(tokenizer, chat_template)
    kind = "ids" if ids_column is not None else "text" if template is None else "chat"
    return Fields(
        kind=kind,
        column=ids_column or text_column or ("messages" if kind == "chat" else "text"),
        template=template,
        render=None if template is None else make_renderer(tokenizer, template),
        n_ids=n_ids,
        token_dtype=token_dtype,
        document_tokens=document_tokens,
        end_id=tokenizer.eos_token_id,
    )
