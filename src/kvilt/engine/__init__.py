"""Documents to caches, questions to answers.

documents    reading documents from files, standard input, strings and dictionaries
text         system text, documents and question to token ids through the model's own chat template; tokens to text
vocabulary   what a tokenizer reads as control, and how it reads ordinary text; made once per model
encoder      documents to stored caches: each once, in batches of like length
engine       one query: tokenise, key, fetch, plan, place, run, decode, answer
streaming    an answer in pieces
"""
