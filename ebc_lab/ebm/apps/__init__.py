"""A model at work in other programs: behind HTTP (`serve`) and in LangChain (`langchain`), extras of the
package. They take a model and what encodes and decodes its tokens."""
