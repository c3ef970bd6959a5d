"""`kvilt serve`: an OpenAI server for one machine, with documents.

settings   what a server is told, and the options of the command line
wire       what a request may say, decoded strictly
replies    what is answered: bodies, events of streams, errors
tenants    who asks: keys, and the namespaces that follow from them
asking     a request as the engine is asked it
receipts   an answer while it is written, and what it took
kept       rows of the last prompts, which the next ones are appended to
worker     one thread owns the model; jobs wait for it in a bounded queue
library    documents of a tenant: encode, list, verify, pin, delete
metrics    counters for Prometheus, and the audit log
door       what every route needs
routes     the routes
app        the application: the table of routes, errors, the page, /openapi.json
launch     uvicorn around it
page/      the playground
"""
