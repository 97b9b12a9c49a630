//! JSON that other programs send. Serde takes a structure's fields from an array as well, in the order in which they happen
//! to stand in the code; nobody shall come to rely on that. And it tells 1.0 from 1, which JSON does not.

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize as _, Deserializer};
use serde_json::{Map, Value};

use crate::units::{number, whole};

/// Reads a structure from an object alone.
///
/// # Errors
/// If it is something else, or its fields do not fit.
pub fn object<'de, D: Deserializer<'de>, T: DeserializeOwned>(from: D) -> Result<T, D::Error> {
    let mut value = Value::Object(Map::deserialize(from)?);
    make_whole(&mut value);
    T::deserialize(value).map_err(D::Error::custom)
}

/// Writes whole numbers as such; beyond 2^53 a number with a point stands for many.
fn make_whole(value: &mut Value) {
    const EXACT_MAX: f64 = number(1 << 53);
    match value {
        Value::Number(found) if found.is_f64() => {
            let is_whole = |float: &f64| float.fract() == 0.0 && (0.0..=EXACT_MAX).contains(float);
            if let Some(float) = found.as_f64().filter(is_whole) {
                *found = whole(float).into();
            }
        }
        Value::Array(values) => values.iter_mut().for_each(make_whole),
        Value::Object(fields) => fields.values_mut().for_each(make_whole),
        _ => {}
    }
}

/// Reads a structure from a text that is one object.
///
/// # Errors
/// If it is something else, or its fields do not fit.
pub fn from_slice<T: DeserializeOwned>(text: &[u8]) -> serde_json::Result<T> {
    let mut from = serde_json::Deserializer::from_slice(text);
    let read = object(&mut from)?;
    from.end()?;
    Ok(read)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Fields {
        number: u64,
    }

    impl Default for Fields {
        fn default() -> Self {
            Self { number: 7 }
        }
    }

    #[test]
    fn only_an_object_is_one() {
        let read = |text: &str| from_slice::<Fields>(text.as_bytes()).map(|fields| fields.number);
        assert!(matches!((read("{}"), read(r#" {"number": 3}"#)), (Ok(7), Ok(3))));
        assert!(matches!(read(r#"{"number": 30e-1}"#), Ok(3)));
        for text in [
            "",
            "[]",
            "[3]",
            "3",
            "null",
            "{} {}",
            r#"{"number": -3}"#,
            r#"{"number": 3.5}"#,
            r#"{"number": 1e300}"#,
            r#"{"colour": 3}"#,
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
