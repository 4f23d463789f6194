"""`pennyweight serve`: an OpenAI-compatible server of one model.

`server` runs the process, `app` admits its requests, `protocol` reads them, `exchange` carries each one out, and
`answers` writes what comes back;
`model` loads what is served and `follow` changes it when its alias moves; `text` makes text of tokens as they come.
"""
