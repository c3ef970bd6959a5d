"""How the built-in model, its documents and questions, and what ships beside it were made.

world/     people, firms and places, and pages and questions about them
tokenizer  byte-level BPE in which names fall into syllables      data     rows of token ids, many questions a context
init       hand-set copying heads to start from                   optim    Muon
train      the base model                                         score    accuracy while it trains
rows       what the methods are trained on, as `kvilt train` reads it
ship       files into the package                                 methods.sh  every training, one after the other

Run its parts as modules, from this folder's parent: `cd recipes; python -m builtin.train --out DIR`."""
