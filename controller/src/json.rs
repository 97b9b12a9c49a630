//! JSON that other programs send. Serde takes a structure's fields from an array as well, in the order in which they happen
//! to stand in the code; nobody shall come to rely on that.

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize as _, Deserializer};
use serde_json::{Map, Value};

/// Reads a structure from an object alone.
///
/// # Errors
/// If it is something else, or its fields do not fit.
pub fn object<'de, D: Deserializer<'de>, T: DeserializeOwned>(from: D) -> Result<T, D::Error> {
    let fields = Map::deserialize(from)?;
    T::deserialize(Value::Object(fields)).map_err(D::Error::custom)
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
        for text in ["", "[]", "[3]", "3", "null", "{} {}", r#"{"number": -3}"#, r#"{"colour": 3}"#]
        {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
