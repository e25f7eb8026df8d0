//! `${VAR}` and `${VAR:-default}` in string values. Works on values that TOML
//! has already taken apart, so no variable can add a key or end a string.

/// What cannot be expanded. Names the variable only when it is a proper name:
/// anything else may be part of a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    /// Byte offset of the `${` in the value.
    pub(super) offset: usize,
    pub(super) message: String,
    pub(super) hint: String,
}

/// Expands every `${…}` in `value`; `$${` stands for `${`. As in the shell, the
/// default after `:-` counts when the variable is not set or empty.
pub(super) fn expand(
    value: &str,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<String, Vec<Fault>> {
    let mut out = String::with_capacity(value.len());
    let mut faults = Vec::new();
    let mut at = 0;
    while let Some(found) = value[at..].find("${") {
        let open = at + found;
        if value[at..open].ends_with('$') {
            out.push_str(&value[at..open - 1]);
            out.push_str("${");
            at = open + 2;
            continue;
        }
        out.push_str(&value[at..open]);
        let Some(length) = value[open + 2..].find('}') else {
            faults.push(Fault {
                offset: open,
                message: "has a `${` without its `}`".into(),
                hint: "close it, or write `$${` for the two characters `${`".into(),
            });
            at = value.len();
            break;
        };
        let close = open + 2 + length;
        match variable(&value[open + 2..close], env) {
            Ok(text) => out.push_str(&text),
            Err((message, hint)) => faults.push(Fault {
                offset: open,
                message,
                hint,
            }),
        }
        at = close + 1;
    }
    out.push_str(&value[at..]);
    if faults.is_empty() {
        Ok(out)
    } else {
        Err(faults)
    }
}

/// `text` such that [`expand`] gives it back.
pub(super) fn escape(text: &str) -> String {
    text.replace("${", "$${")
}

fn variable(inner: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<String, (String, String)> {
    let (name, default) = match inner.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inner, None),
    };
    if !is_name(name) {
        return Err((
            "has a `${…}` that does not hold a variable's name".into(),
            "write `${NAME}` or `${NAME:-default}` with letters, digits and _, or `$${` for the \
             two characters `${`"
                .into(),
        ));
    }
    match (env(name), default) {
        (_, Some(default)) if default.contains("${") => Err((
            format!("has a `${{` inside the default of `{name}`"),
            "a default is plain text; it cannot hold another variable".into(),
        )),
        (Some(text), None) => Ok(text),
        (Some(text), Some(_)) if !text.is_empty() => Ok(text),
        (_, Some(default)) => Ok(default.to_owned()),
        (None, None) => Err((
            format!("needs the environment variable `{name}`, which is not set"),
            format!("set {name}, or give a default: `${{{name}:-default}}`"),
        )),
    }
}

fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic() || first == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn env(name: &str) -> Option<String> {
        match name {
            "HOST" => Some("rabbit".into()),
            "EMPTY" => Some(String::new()),
            "TRICK" => Some("${HOST}\"\n[redis]".into()),
            _ => None,
        }
    }

    fn expanded(value: &str) -> String {
        expand(value, &env).unwrap()
    }

    fn fault(value: &str) -> Fault {
        let mut faults = expand(value, &env).unwrap_err();
        assert_eq!(faults.len(), 1, "{faults:?}");
        faults.remove(0)
    }

    #[test]
    fn variables_are_replaced_and_defaults_stand_in_for_missing_and_empty_ones() {
        assert_eq!(expanded("amqp://${HOST}:5672"), "amqp://rabbit:5672");
        assert_eq!(expanded("${HOST}${HOST}"), "rabbitrabbit");
        assert_eq!(expanded("${NONE:-a:-b}"), "a:-b");
        assert_eq!(expanded("${EMPTY:-x}"), "x");
        assert_eq!(expanded("[${EMPTY}]"), "[]");
        assert_eq!(expanded("${NONE:-}"), "");
        assert_eq!(expanded("${HOST:-x}"), "rabbit");
    }

    #[test]
    fn two_dollars_before_a_brace_stand_for_themselves() {
        assert_eq!(expanded("$${HOST}"), "${HOST}");
        assert_eq!(expanded("$$${HOST}"), "$${HOST}");
        assert_eq!(expanded("$$ DO $$ $1 {x}"), "$$ DO $$ $1 {x}");
    }

    #[test]
    fn a_variable_is_not_expanded_twice() {
        assert_eq!(expanded("${TRICK}"), "${HOST}\"\n[redis]");
    }

    #[test]
    fn what_cannot_be_expanded_is_named_with_its_offset() {
        let unset = fault("ab${NONE}");
        assert_eq!(unset.offset, 2);
        assert!(unset.message.contains("`NONE`"), "{unset:?}");
        assert!(fault("x${HOST").message.contains("without its `}`"));
        assert!(fault("${1A}").message.contains("variable's name"));
        assert!(fault("${}").message.contains("variable's name"));
        assert!(fault("${A:-${B}}").message.contains("inside the default"));
        assert_eq!(expand("${A}-${B}", &env).unwrap_err().len(), 2);
    }

    proptest! {
        #[test]
        fn an_escaped_text_expands_to_itself(text in "([$]|[{]|[}]|[A-Z]|:-|é){0,20}") {
            prop_assert_eq!(expand(&escape(&text), &|_| None), Ok(text));
        }

        #[test]
        fn expanding_never_panics(text in "\\PC*") {
            let _ = expand(&text, &|_| Some("x".into()));
        }
    }
}
