"""Retrieval-augmented answers with LangChain: BM25 finds passages, Kvilt answers from their caches.

    pip install 'kvilt[langchain,retrieve]'
    python examples/rag_bm25.py                 # or: MODEL [QUESTION...]

The first run encodes sixty paragraphs of Wikipedia; every later one, with any question, finds them in the store."""

import sys

from langchain_core.runnables import RunnableLambda

from kvilt import builtin
from kvilt.corpora.retrieval import BM25
from kvilt.integrations.langchain import ChatKvilt


def main(model: str, questions: list[str], store: str = "disk") -> None:
    """Encode the passages, and answer each question from the four that suit it best."""
    passages = list(builtin.wikipedia().values())
    chat = ChatKvilt(model=model, store=store, max_tokens=40)
    chat.encode(passages)
    chain = chat.over(RunnableLambda(BM25(top=4).over(passages)))
    for question in questions:
        answer = chain.invoke(question)
        usage = answer.response_metadata["usage"]
        print(f"{question}\n  {answer.text}")
        print(f"  {usage['hits']} of 4 passages reused, first token after {usage['ttft_s']:.3f} s")


if __name__ == "__main__":
    named, *asked = sys.argv[1:] or ["builtin"]
    main(named, asked or [q["question"] for q in builtin.wikipedia_questions()[:3]])
