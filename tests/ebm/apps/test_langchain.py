"""The model as a language model of LangChain, in real chains."""

import asyncio
import copy
import sys

import pytest

pytest.importorskip("langchain_core")

from langchain_core.caches import InMemoryCache
from langchain_core.output_parsers import CommaSeparatedListOutputParser, StrOutputParser
from langchain_core.prompts import PromptTemplate

from ebc_lab.ebm.apps.langchain import EBCLanguageModel
from ebc_lab.ebm.apps.writer import Writer, Writing

WRITING = Writing(tokens=40, temperature=1.0, langevin_steps=2, seed=3)


@pytest.fixture(scope="module")
def llm(model, letters, context):
    return EBCLanguageModel(model=model, tokenizer=letters, context=context, writing=WRITING)


@pytest.fixture(scope="module")
def expected(model, letters, context):
    """What the library writes after `say cat`."""
    return Writer(model, letters, context).continued("say cat", WRITING)


@pytest.mark.thorough
def test_a_chain_of_prompt_model_and_parser(llm, expected):
    chain = PromptTemplate.from_template("say {word}") | llm | StrOutputParser()
    assert len(expected) == 40
    assert chain.invoke({"word": "cat"}) == expected
    assert asyncio.run(chain.ainvoke({"word": "cat"})) == expected
    assert "".join(chain.stream({"word": "cat"})) == expected
    assert chain.batch([{"word": "cat"}, {"word": "mat"}])[0] == expected
    parsed = (PromptTemplate.from_template("say {word}") | llm | CommaSeparatedListOutputParser()).invoke(
        {"word": "cat"}
    )
    assert isinstance(parsed, list)


def test_a_stop_word_ends_the_text_before_it_and_of_several_the_first(llm, expected):
    early, late = expected[5:8], expected[20:23]
    first = min(expected.index(early), expected.index(late))
    assert llm.invoke("say cat", stop=[late, early]) == expected[:first]
    assert llm.bind(stop=[late, early]).invoke("say cat") == expected[:first]
    last = next(i for i, letter in enumerate(expected) if i and letter not in expected[:i])
    assert llm.invoke("say cat", stop=[expected[last], expected[: last + 1]]) == ""  # both end at `last`
    assert llm.invoke("say cat", stop=["#"]) == expected


def test_settings_can_be_given_with_a_call(llm, expected):
    assert llm.invoke("say cat", tokens=7) == expected[:7]
    assert llm.bind(seed=4).invoke("say cat") != expected
    for wrong in ({"token": 7}, {"tokens": -1}, {"stop": [""]}):
        with pytest.raises(ValueError, match=r"token|stop word"):
            llm.invoke("say cat", **wrong)


def test_tokens_are_counted_by_its_own_tokenizer(llm):
    assert llm.get_num_tokens("the cat") == 7


def test_a_cache_tells_models_and_settings_apart(model, letters, context):
    def made(model, **writing):
        writing = Writing(tokens=20, langevin_steps=0, **writing)
        return EBCLanguageModel(
            model=model, tokenizer=letters, context=context, writing=writing, cache=InMemoryCache()
        )

    def key(llm):
        llm.invoke("a")
        [(_, settings)] = llm.cache._cache
        return settings

    known = key(made(model))
    assert key(made(model)) == known
    assert key(made(model, seed=1)) != known
    trained, counted = copy.deepcopy(model), copy.deepcopy(model)
    trained.pair_weight.data.add_(1e-6)
    counted.store.alpha.mul_(1.5)  # which statistics move, not the gradient
    assert known not in (key(made(trained)), key(made(counted)))


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "ebc_lab.ebm.apps.langchain")
    monkeypatch.setitem(sys.modules, "langchain_core.language_models.llms", None)
    with pytest.raises(ImportError, match=r"pip install 'ebc-lab\[langchain\]'"):
        from ebc_lab.ebm.apps.langchain import EBCLanguageModel  # noqa: F401
