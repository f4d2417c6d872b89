"""SAEs in other projects' formats, and theirs in ours.

portable.py             what an SAE computes, in one form that every format is written from and read into
files.py                JSON, safetensors and torch files, written whole and read with clear errors
saelens.py, sparsify.py, dictionary_learning.py, openai.py, mlsae.py
formats.py              all of them by name, and telling them apart by their files
card.py                 the model card: how the SAE was made, and what it computes
hub.py                  to and from the Hugging Face hub
run.py                  a portable SAE as a finished run
"""
