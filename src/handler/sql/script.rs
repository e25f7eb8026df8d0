//! A handler's text, split into its statements.

use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::tokenizer::{Location, Token, TokenWithSpan, Tokenizer};

/// Why a handler's text cannot be run at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("failed to read the handler's SQL, {origin}, line {line}: {problem}")]
pub struct ScriptError {
    /// The file, or `inline`.
    pub origin: String,
    /// Line in the text, from 1.
    pub line: u64,
    /// What is wrong, and the way out.
    pub problem: String,
}

/// What a statement is to PL/pgSQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// It returns rows.
    Query,
    /// It writes, and returns none.
    Write,
    /// It cannot read the relation.
    Utility,
}

/// One statement of a script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Statement {
    pub(super) kind: Kind,
    /// Line in the text, from 1.
    pub(super) line: u64,
    /// What stands before the relation and between it and the rest.
    around: (&'static str, &'static str),
    /// The user's text, without a leading `WITH`.
    rest: String,
}

impl Statement {
    /// The statement, with `relation` put before it where it can read one.
    pub(super) fn text(&self, relation: &str) -> String {
        match self.kind {
            Kind::Utility => self.rest.clone(),
            Kind::Query | Kind::Write => {
                let (before, between) = self.around;
                format!("{before} {relation}{between}{}", self.rest)
            }
        }
    }
}

/// Splits a script at its semicolons. The tokens are PostgreSQL's (dollar
/// quotes, nested comments, escape strings), by way of `sqlparser`; whether
/// the statements are sound is for the server to say.
pub(super) fn split(text: &str, origin: &str) -> Result<Vec<Statement>, ScriptError> {
    let error = |line: u64, problem: String| ScriptError {
        origin: origin.to_owned(),
        line,
        problem,
    };
    let tokenize = |text: &str| {
        Tokenizer::new(&PostgreSqlDialect {}, text)
            .tokenize_with_location()
            .map_err(|e| error(e.location.line, e.message))
    };
    let text = &with_quoted_loops(text, &tokenize(text)?);
    let tokens = tokenize(text)?;
    let mut cursor = Cursor::new(text);
    let mut statements = Vec::new();
    for group in tokens.split(|t| t.token == Token::SemiColon) {
        let significant: Vec<&TokenWithSpan> = group
            .iter()
            .filter(|t| !matches!(t.token, Token::Whitespace(_) | Token::EOF))
            .collect();
        let (Some(first), Some(last)) = (significant.first(), significant.last()) else {
            continue;
        };
        let line = first.span.start.line;
        if let Some(placeholder) = significant
            .iter()
            .find(|t| matches!(t.token, Token::Placeholder(_)))
        {
            return Err(error(
                placeholder.span.start.line,
                format!(
                    "{} is a parameter, and a handler has none: read the relation message",
                    placeholder.token
                ),
            ));
        }
        let starts: Vec<usize> = significant
            .iter()
            .take(WORDS)
            .map(|t| cursor.offset(t.span.start))
            .collect();
        let end = cursor.offset(last.span.end);
        let from: Vec<&str> = starts.iter().map(|start| &text[*start..end]).collect();
        statements
            .push(statement(&from, &significant, line).map_err(|problem| error(line, problem))?);
    }
    if statements.is_empty() {
        return Err(error(1, "there is no statement in it".to_owned()));
    }
    Ok(statements)
}

/// Tokens at the start of a statement that are looked at.
const WORDS: usize = 3;

/// `loop` as a name is put into quotes, which changes nothing for the server:
/// to PL/pgSQL it would be the end of a query.
fn with_quoted_loops(text: &str, tokens: &[TokenWithSpan]) -> String {
    let mut cursor = Cursor::new(text);
    let mut quoted = String::with_capacity(text.len());
    let mut copied = 0;
    for token in tokens {
        if let Token::Word(word) = &token.token
            && word.quote_style.is_none()
            && word.value.eq_ignore_ascii_case("loop")
        {
            let start = cursor.offset(token.span.start);
            quoted.push_str(&text[copied..start]);
            quoted.push_str("\"loop\"");
            copied = start + word.value.len();
        }
    }
    quoted.push_str(&text[copied..]);
    quoted
}

/// Finds out what a statement is. `from` is the statement from its first token
/// on, from its second, from its third, as far as it has them.
fn statement(from: &[&str], tokens: &[&TokenWithSpan], line: u64) -> Result<Statement, String> {
    let word = |index: usize| match tokens.get(index).map(|t| &t.token) {
        Some(Token::Word(word)) if word.quote_style.is_none() => word.value.to_ascii_uppercase(),
        Some(token) => token.to_string(),
        None => String::new(),
    };
    let (kind, around, first) = match word(0).as_str() {
        "WITH" if word(1) == "RECURSIVE" => (of_rows(tokens), ("WITH RECURSIVE", ", "), 2),
        "WITH" => (of_rows(tokens), ("WITH", ", "), 1),
        "INSERT" | "UPDATE" | "DELETE" | "MERGE" => (of_rows(tokens), ("WITH", " "), 0),
        "SELECT" | "VALUES" | "TABLE" | "(" => (Kind::Query, ("WITH", " "), 0),
        "CALL" | "DO" | "LOCK" | "NOTIFY" | "TRUNCATE" => (Kind::Utility, ("", ""), 0),
        "SET" if matches!(word(1).as_str(), "LOCAL" | "CONSTRAINTS") => {
            (Kind::Utility, ("", ""), 0)
        }
        other => {
            return Err(format!(
                "a handler cannot run {other}: it works inside the ledger's transaction, with \
                 SELECT, INSERT, UPDATE, DELETE, MERGE, VALUES, TABLE and WITH (which can read \
                 message), CALL, DO, LOCK, NOTIFY, TRUNCATE, SET LOCAL and SET CONSTRAINTS (which \
                 cannot)"
            ));
        }
    };
    Ok(Statement {
        kind,
        line,
        around,
        rest: from.get(first).copied().unwrap_or_default().to_owned(),
    })
}

/// Whether a statement returns rows: one that writes does so by a `RETURNING` of
/// its own, outside of all parentheses; before it may stand a `WITH`.
fn of_rows(tokens: &[&TokenWithSpan]) -> Kind {
    let mut depth = 0_usize;
    let mut writes = false;
    for token in tokens {
        match &token.token {
            Token::LParen => depth += 1,
            Token::RParen => depth = depth.saturating_sub(1),
            Token::Word(word) if depth == 0 && word.quote_style.is_none() => {
                match word.value.to_ascii_uppercase().as_str() {
                    "INSERT" | "UPDATE" | "DELETE" | "MERGE" => writes = true,
                    "RETURNING" => return Kind::Query,
                    "SELECT" | "VALUES" | "TABLE" if !writes => return Kind::Query,
                    _ => {}
                }
            }
            _ => {}
        }
    }
    match writes {
        true => Kind::Write,
        false => Kind::Query,
    }
}

/// Finds the byte offsets of places that the tokenizer counts in lines and
/// characters. It goes forward alone: the places of a script, in their order,
/// cost one walk through it.
struct Cursor<'a> {
    text: &'a str,
    rest: std::str::Chars<'a>,
    place: Location,
}

impl<'a> Cursor<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            text,
            rest: text.chars(),
            place: Location::new(1, 1),
        }
    }

    /// Goes on to `place`, or to the end if that comes first; stays where it is
    /// if `place` lies behind it.
    fn offset(&mut self, place: Location) -> usize {
        while self.place < place {
            match self.rest.next() {
                Some('\n') => self.place = Location::new(self.place.line + 1, 1),
                Some(_) => self.place.column += 1,
                None => break,
            }
        }
        self.text.len() - self.rest.as_str().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn texts(script: &str) -> Vec<String> {
        split(script, "inline")
            .unwrap()
            .into_iter()
            .map(|s| s.text("message"))
            .collect()
    }

    fn problem(script: &str) -> (u64, String) {
        let error = split(script, "inline").unwrap_err();
        (error.line, error.problem)
    }

    #[test]
    fn the_relation_stands_before_what_can_read_it() {
        assert_eq!(texts("SELECT 1"), ["WITH message SELECT 1"]);
        assert_eq!(
            texts("with a as (select 1) table a"),
            ["WITH message, a as (select 1) table a"]
        );
        assert_eq!(
            texts("WITH  RECURSIVE a AS (SELECT 1) TABLE a;"),
            ["WITH RECURSIVE message, a AS (SELECT 1) TABLE a"]
        );
        assert_eq!(texts("DO $$ BEGIN END $$"), ["DO $$ BEGIN END $$"]);
        assert_eq!(
            texts("SET LOCAL work_mem = '1MB'; set constraints all immediate"),
            [
                "SET LOCAL work_mem = '1MB'",
                "set constraints all immediate"
            ]
        );
    }

    #[test]
    fn what_returns_rows_is_told_from_what_only_writes() {
        for (script, kind) in [
            ("insert into t select returning_x from message", Kind::Write),
            ("insert into t values (1) returning id", Kind::Query),
            ("update t set a = (select 1)", Kind::Write),
            ("delete from t using message returning *", Kind::Query),
            (
                "with a as (delete from t returning *) insert into u select * from a",
                Kind::Write,
            ),
            ("with a as (insert into t values (1)) select 1", Kind::Query),
            ("with a as (select 1) (select 2)", Kind::Query),
            (
                "with recursive a as (select 1) update t set x = 1",
                Kind::Write,
            ),
            (
                "merge into t using message on true when matched then delete",
                Kind::Write,
            ),
            ("table message", Kind::Query),
            ("call f()", Kind::Utility),
        ] {
            assert_eq!(split(script, "x").unwrap()[0].kind, kind, "{script}");
        }
    }

    #[test]
    fn loop_as_a_name_is_quoted_and_inside_strings_it_is_left_alone() {
        assert_eq!(
            texts("select Loop, 'loop', \"loop\" from a.LOOP -- loop\n; DO $$ LOOP $$"),
            [
                "WITH message select \"loop\", 'loop', \"loop\" from a.\"loop\"",
                "DO $$ LOOP $$"
            ]
        );
    }

    #[test]
    fn semicolons_split_only_between_statements() {
        let script = "-- one; two\nINSERT INTO t SELECT ';', $tag$;$tag$, \"a;b\", E'\\';' FROM message;\n\
                      /* ; /* ; */ */ DELETE FROM ü WHERE x = 'ä;ö' ;;\n;";
        assert_eq!(
            texts(script),
            [
                "WITH message INSERT INTO t SELECT ';', $tag$;$tag$, \"a;b\", E'\\';' FROM message",
                "WITH message DELETE FROM ü WHERE x = 'ä;ö'",
            ]
        );
    }

    #[test]
    fn places_are_found_in_one_walk_through_a_script() {
        let mut cursor = Cursor::new("ü;\nSELECT 'ä';\r\nx");
        for (line, column, offset, rest) in [
            (1, 2, 2, ";\nSELECT 'ä';\r\nx"),
            (2, 1, 4, "SELECT 'ä';\r\nx"),
            (2, 11, 15, ";\r\nx"),
            (2, 11, 15, ";\r\nx"),
            // Never back.
            (1, 1, 15, ";\r\nx"),
            (3, 2, 19, ""),
            (9, 9, 19, ""),
        ] {
            assert_eq!(cursor.offset(Location::new(line, column)), offset);
            assert_eq!(cursor.rest.as_str(), rest);
        }
    }

    #[test]
    fn what_would_end_the_transaction_is_refused_with_its_line() {
        for word in [
            "COMMIT",
            "begin",
            "ROLLBACK",
            "SAVEPOINT a",
            "SET x = 1",
            "COPY t FROM STDIN",
        ] {
            let (line, problem) = problem(&format!("SELECT 1;\n\n{word};"));
            assert_eq!(line, 3, "{word}");
            assert!(problem.contains("a handler cannot run"), "{problem}");
        }
    }

    #[test]
    fn parameters_and_empty_scripts_are_refused() {
        assert!(problem("SELECT\n$1").1.contains("relation message"));
        assert_eq!(problem("SELECT\n$1").0, 2);
        assert!(problem(" -- nothing\n ; ").1.contains("no statement"));
        assert!(split("SELECT 'open", "inline").is_err());
    }

    proptest! {
        #[test]
        fn splitting_never_panics(script in "[ ;a-zA-Z0-9$'\"\\-/*\nüE()]{0,80}") {
            split(&script, "inline").ok();
        }
    }
}
