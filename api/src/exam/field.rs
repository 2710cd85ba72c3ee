//! One function a field: reads it and refuses what cannot work, where the reader still knows the line.
use std::{collections::BTreeMap, fmt};

use carrel_agent::wire::limits;
use serde::{
    Deserialize, Deserializer, Serializer,
    de::{Error, Visitor},
};
use utoipa::openapi::{RefOr, Schema, schema};

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

/// All variables of an exam with their names, bytes: they travel in the header of each process.
const ENV_BYTES: usize = 64 * 1024;

/// Is this an exam's id?
pub fn is_id(text: &str) -> bool {
    let mut bytes = text.bytes();
    text.len() <= 64
        && bytes.next().is_some_and(|byte| byte.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

fn checked<'de, D: Deserializer<'de>>(
    reader: D,
    ok: impl FnOnce(&str) -> bool,
    allowed: &'static str,
) -> Result<String, D::Error> {
    let text = String::deserialize(reader)?;
    if ok(&text) { Ok(text) } else { Err(D::Error::custom(allowed)) }
}

fn checked_option<'de, D: Deserializer<'de>>(
    reader: D,
    ok: impl FnOnce(&str) -> bool,
    allowed: &'static str,
) -> Result<Option<String>, D::Error> {
    match Option::<String>::deserialize(reader)? {
        Some(text) if !ok(&text) => Err(D::Error::custom(allowed)),
        other => Ok(other),
    }
}

fn ranged<'de, D: Deserializer<'de>>(reader: D, low: u32, high: u32) -> Result<u32, D::Error> {
    let number = i64::deserialize(reader)?;
    u32::try_from(number)
        .ok()
        .filter(|number| (low..=high).contains(number))
        .ok_or_else(|| D::Error::custom(format!("{number} is not between {low} and {high}")))
}

pub fn id<'de, D: Deserializer<'de>>(reader: D) -> Result<String, D::Error> {
    checked(
        reader,
        is_id,
        "an id is a letter or digit and then up to 63 more of letters, digits, `.`, `_` and `-`",
    )
}

pub fn title<'de, D: Deserializer<'de>>(reader: D) -> Result<String, D::Error> {
    let fits = |text: &str| {
        !text.trim().is_empty() && text.chars().count() <= 200 && !text.chars().any(char::is_control)
    };
    checked(reader, fits, "a title is one line of 1 to 200 characters")
}

pub fn duration_minutes<'de, D: Deserializer<'de>>(reader: D) -> Result<u32, D::Error> {
    ranged(reader, 1, 10_080)
}

pub fn start_within_seconds<'de, D: Deserializer<'de>>(reader: D) -> Result<u32, D::Error> {
    ranged(reader, 10, 86_400)
}

pub fn reconnect_window_seconds<'de, D: Deserializer<'de>>(reader: D) -> Result<u32, D::Error> {
    ranged(reader, 0, 86_400)
}

pub fn warm<'de, D: Deserializer<'de>>(reader: D) -> Result<u32, D::Error> {
    ranged(reader, 0, 1000)
}

pub fn processes<'de, D: Deserializer<'de>>(reader: D) -> Result<Option<u32>, D::Error> {
    match Option::<i64>::deserialize(reader)? {
        None => Ok(None),
        Some(number) => u32::try_from(number)
            .ok()
            .filter(|number| (8..=65_536).contains(number))
            .map(Some)
            .ok_or_else(|| D::Error::custom(format!("{number} is not between 8 and 65536"))),
    }
}

pub fn image<'de, D: Deserializer<'de>>(reader: D) -> Result<Option<String>, D::Error> {
    checked_option(
        reader,
        is_image,
        "an image is written [registry[:port]/]name[:tag][@sha256:digest], its name in lower case",
    )
}

/// The grammar of OCI references, as far as typing errors go; the registry has the last word.
fn is_image(text: &str) -> bool {
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (text, None),
    };
    let digest_fits = digest.is_none_or(|digest| {
        digest.split_once(':').is_some_and(|(algorithm, hex)| {
            matches!((algorithm, hex.len()), ("sha256", 64) | ("sha512", 128))
                && hex.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
        })
    });
    // A colon after the last slash starts a tag; before it, a port.
    let (name, tag) = match rest.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    let tag_fits = tag.is_none_or(|tag| {
        (1..=128).contains(&tag.len())
            && tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
            && !tag.starts_with(['.', '-'])
    });
    let mut parts = name.split('/').peekable();
    if let Some((registry, _)) = name.split_once('/')
        && (registry.contains(['.', ':']) || registry == "localhost")
    {
        let host_fits = registry.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".:-[]".contains(&byte));
        if !host_fits {
            return false;
        }
        parts.next();
    }
    let parts_fit = parts.all(|part| {
        let edge = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        part.as_bytes().first().is_some_and(edge)
            && part.as_bytes().last().is_some_and(edge)
            && part.bytes().all(|byte| edge(&byte) || b"._-".contains(&byte))
    });
    text.len() <= 512 && digest_fits && tag_fits && parts_fit
}

pub fn shell<'de, D: Deserializer<'de>>(reader: D) -> Result<Option<String>, D::Error> {
    let fits = |text: &str| {
        text.starts_with('/')
            && text.len() <= 255
            && !text.ends_with('/')
            && !text.chars().any(char::is_control)
    };
    checked_option(reader, fits, "a shell is the absolute path of a program, such as /bin/bash")
}

pub fn user<'de, D: Deserializer<'de>>(reader: D) -> Result<Option<String>, D::Error> {
    struct Name;

    impl<'de> Deserialize<'de> for Written {
        fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
            reader.deserialize_any(Name).map(Self)
        }
    }

    struct Written(String);

    impl Visitor<'_> for Name {
        type Value = String;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a user's name, or a number up to 65534")
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
            let edge = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
            let named = text.len() <= 32
                && text.bytes().next().is_some_and(edge)
                && text.bytes().all(|byte| edge(byte) || byte.is_ascii_digit() || byte == b'-');
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            let numbered = digits && text.parse::<u32>().is_ok_and(|number| number <= 65_534);
            if named || numbered {
                Ok(text.to_owned())
            } else {
                Err(E::custom(
                    "a user is a name of up to 32 of a-z, 0-9, `_` and `-`, or a number up to 65534",
                ))
            }
        }

        fn visit_u64<E: Error>(self, number: u64) -> Result<String, E> {
            self.visit_str(&number.to_string())
        }

        fn visit_i64<E: Error>(self, number: i64) -> Result<String, E> {
            self.visit_str(&number.to_string())
        }
    }

    Ok(Option::<Written>::deserialize(reader)?.map(|Written(name)| name))
}

pub fn env<'de, D: Deserializer<'de>>(reader: D) -> Result<BTreeMap<String, String>, D::Error> {
    let env = BTreeMap::<String, String>::deserialize(reader)?;
    if env.len() > limits::ENV_VARS {
        return Err(D::Error::custom(format!("{} variables, at most {} fit", env.len(), limits::ENV_VARS)));
    }
    let mut size = 0;
    for (name, value) in &env {
        let mut bytes = name.bytes();
        let named = name.len() <= 256
            && bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_')
            && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if !named {
            return Err(D::Error::custom(format!(
                "{name:?} is not a variable's name: a letter or `_`, then letters, digits and `_`"
            )));
        }
        if value.contains('\0') {
            return Err(D::Error::custom(format!("the value of {name} contains a NUL")));
        }
        size += name.len() + value.len();
    }
    if size > ENV_BYTES {
        return Err(D::Error::custom(format!("{size} bytes of variables, at most {ENV_BYTES} fit")));
    }
    Ok(env)
}

pub fn setup<'de, D: Deserializer<'de>>(reader: D) -> Result<Option<String>, D::Error> {
    checked_option(
        reader,
        |text| text.len() <= limits::SETUP_BYTES && !text.contains('\0'),
        "a setup script has at most 256 KiB (262144 bytes) and no NUL",
    )
}

pub fn runtime_class<'de, D: Deserializer<'de>>(reader: D) -> Result<Option<String>, D::Error> {
    let edge = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let fits = |text: &str| {
        text.len() <= 253
            && text.split('.').all(|part| {
                part.as_bytes().first().is_some_and(edge)
                    && part.as_bytes().last().is_some_and(edge)
                    && part.bytes().all(|byte| edge(&byte) || byte == b'-')
            })
    };
    checked_option(reader, fits, "a runtime class is named in lower case letters, digits, `-` and `.`")
}

/// A quantity as text, before it has a unit.
struct Quantity(String);

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        struct Written;

        impl Visitor<'_> for Written {
            type Value = String;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number or a quantity such as 500m, 256Mi or 1G")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
                Ok(text.to_owned())
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<String, E> {
                Ok(number.to_string())
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<String, E> {
                Ok(number.to_string())
            }

            fn visit_f64<E: Error>(self, number: f64) -> Result<String, E> {
                Ok(number.to_string())
            }
        }

        reader.deserialize_any(Written).map(Self)
    }
}

/// `digits[.digits]suffix` in units of one `base`th, exactly; `None` for what is none or does not come out whole.
fn amount(text: &str, base: u128, suffixes: &[(&str, u128)]) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at_checked(end)?;
    let factor = match suffix {
        "" => base,
        _ => suffixes.iter().find(|(name, _)| *name == suffix)?.1,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    // Longer ones are out of every range; 24 digits and the largest factor fit u128.
    if whole.is_empty() || fraction.contains('.') || whole.len() > 12 + 3 || fraction.len() > 9 {
        return None;
    }
    let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let digits: u128 = format!("{whole}{fraction}").parse().ok()?;
    let scaled = digits.checked_mul(factor)?;
    (scaled % scale == 0).then_some(())?;
    u64::try_from(scaled / scale).ok()
}

const BYTE_SUFFIXES: [(&str, u128); 9] = [
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("Pi", 1 << 50),
];

pub fn cpu<'de, D: Deserializer<'de>>(reader: D) -> Result<Option<u64>, D::Error> {
    let Some(Quantity(text)) = Option::<Quantity>::deserialize(reader)? else { return Ok(None) };
    amount(&text, 1000, &[("m", 1)]).filter(|cpu| (10..=256_000).contains(cpu)).map(Some).ok_or_else(|| {
        D::Error::custom(format!("{text:?} is not between 10m and 256 cores, written like 500m, 0.5 or 2"))
    })
}

/// Written as a quantity: a bare number would be read back as whole cores.
#[expect(clippy::ref_option, reason = "serde gives the field by reference")]
pub fn write_cpu<S: Serializer>(cpu: &Option<u64>, writer: S) -> Result<S::Ok, S::Error> {
    match cpu {
        None => writer.serialize_none(),
        Some(cpu) => writer.serialize_some(&format!("{cpu}m")),
    }
}

fn bytes<'de, D: Deserializer<'de>>(
    reader: D,
    low: u64,
    high: u64,
    range: &'static str,
) -> Result<Option<u64>, D::Error> {
    let Some(Quantity(text)) = Option::<Quantity>::deserialize(reader)? else { return Ok(None) };
    amount(&text, 1, &BYTE_SUFFIXES).filter(|bytes| (low..=high).contains(bytes)).map(Some).ok_or_else(|| {
        D::Error::custom(format!("{text:?} is not between {range}, written like 256Mi, 1G or as bytes"))
    })
}

pub fn memory<'de, D: Deserializer<'de>>(reader: D) -> Result<Option<u64>, D::Error> {
    bytes(reader, 16 * MIB, 4 * TIB, "16Mi and 4Ti")
}

pub fn storage<'de, D: Deserializer<'de>>(reader: D) -> Result<Option<u64>, D::Error> {
    bytes(reader, MIB, 64 * TIB, "1Mi and 64Ti")
}

/// A number or a Kubernetes quantity.
pub fn quantity_schema() -> RefOr<Schema> {
    let text = schema::ObjectBuilder::new().schema_type(schema::Type::String).build();
    let number = schema::ObjectBuilder::new().schema_type(schema::Type::Number).build();
    let none = schema::ObjectBuilder::new().schema_type(schema::Type::Null).build();
    schema::OneOfBuilder::new()
        .item(text)
        .item(number)
        .item(none)
        .description(Some("A number, or a Kubernetes quantity such as `500m`, `256Mi`, `1G`."))
        .into()
}
